"""Path mapping, script mode, manifests and traffic steps: the pure parts of the container contract."""

import json
import sys
from pathlib import Path

import pytest

from local.sagemaker import toolkit
from local.sagemaker.container import Container, resource_config
from local.sagemaker.endpoints import steps
from local.sagemaker.instances import smooth_choice
from local.sagemaker.transfers import TransferError, Transfers, relative_name, split


@pytest.fixture
def container(tmp_path, settings):
    return Container(tmp_path / "job", settings)


def test_opt_ml_is_mapped_at_the_start_of_a_word_and_after_an_equals_sign_only(container):
    base = str(container.opt_ml)
    assert container.localised("/opt/ml/model") == f"{base}/model"
    assert container.localised("--out=/opt/ml/output") == f"--out={base}/output"
    assert container.localised("/opt/ml") == base
    assert container.localised("/opt/mlx") == "/opt/mlx"
    assert container.localised("see /opt/ml/model") == "see /opt/ml/model"


def test_images_become_commands(container, settings):
    folder = str(settings.checkout / "inference")
    assert container.command("local/inference:abc", [], ["serve"]) == (
        [sys.executable, folder, "serve"],
        {"PYTHONPATH": folder},
    )
    argv, env = container.command("local/inference:abc", ["python3", "/opt/ml/code/x.py"], ["--a", "1"])
    assert argv == [sys.executable, f"{container.opt_ml}/code/x.py", "--a", "1"] and env == {"PYTHONPATH": folder}
    argv, env = container.command("763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2", ["python3", "-m", "a"], [])
    assert argv == [sys.executable, "-m", "a"] and env == {}


def test_hyperparameters_reach_the_script_as_the_toolkit_passes_them():
    given = {
        "sagemaker_program": '"train.py"',
        "lr": '"0.1"',
        "batch-size": "32",
        "flag": "true",
        "e": "3",
        "name": "plain words",
        "_tuning_objective_metric": "accuracy",
    }
    own = toolkit.user_hyperparameters(given)
    assert own == {"lr": "0.1", "batch-size": 32, "flag": True, "e": 3, "name": "plain words"}
    assert toolkit.arguments(own) == [
        "--batch-size",
        "32",
        "-e",
        "3",
        "--flag",
        "True",
        "--lr",
        "0.1",
        "--name",
        "plain words",
    ]


def test_sm_variables_point_into_the_job_folder(container):
    container.write_config("inputdataconfig", {"training": {"TrainingInputMode": "File"}})
    record = {
        "TrainingJobName": "job",
        "ResourceConfig": {"InstanceType": "ml.m5.large"},
        "HyperParameters": {"sagemaker_program": "train.py", "lr": "0.1"},
    }
    env = toolkit.environment(container, record, ["training"], ["--lr", "0.1"])
    assert env["SM_MODEL_DIR"] == str(container.model)
    assert env["SM_CHANNEL_TRAINING"] == str(container.opt_ml / "input" / "data" / "training")
    assert json.loads(env["SM_CHANNELS"]) == ["training"] and json.loads(env["SM_HPS"]) == {"lr": 0.1}
    assert env["SM_HP_LR"] == "0.1" and json.loads(env["SM_HOSTS"]) == ["algo-1"] == resource_config("x")["hosts"]
    assert json.loads(env["SM_TRAINING_ENV"])["job_name"] == "job"


@pytest.mark.parametrize(
    ("key", "prefix", "name"),
    [
        ("data/a/1.jpg", "data/", "a/1.jpg"),
        ("data/a/1.jpg", "data", "a/1.jpg"),
        ("data/m.tar.gz", "data/m.tar.gz", "m.tar.gz"),
        ("data2/1.jpg", "data", "data2/1.jpg"),
        ("1.jpg", "", "1.jpg"),
    ],
)
def test_where_an_object_lands_in_its_channel(key, prefix, name):
    assert relative_name(key, prefix) == name


def test_s3_uris_are_split_and_others_refused():
    assert split("s3://bucket/a/b c#1?.txt") == ("bucket", "a/b c#1?.txt")
    assert split("s3://bucket") == ("bucket", "")
    with pytest.raises(TransferError, match="not an S3 URI"):
        split("/tmp/x")


class FakeS3:
    """get_object from a dict; what is asked of it beyond that fails."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def get_object(self, Bucket: str, Key: str) -> dict:  # noqa: N803  # boto3's names
        data = self.objects[f"{Bucket}/{Key}"]

        class Body:
            def read(self) -> bytes:
                return data

            def iter_chunks(self, size: int):
                yield data

        return {"Body": Body()}


def test_a_manifest_that_would_leave_the_channel_is_refused(tmp_path):
    transfers = Transfers({"AWS_REGION": "us-east-1"}, "role")
    manifest = json.dumps([{"prefix": "s3://b/p/"}, "../../escape.txt"]).encode()
    transfers.__dict__["s3"] = FakeS3({"b/m": manifest, "b/p/../../escape.txt": b"x"})
    with pytest.raises(TransferError, match="leaves the channel"):
        transfers.download("s3://b/m", "ManifestFile", tmp_path / "channel")
    assert not (Path(tmp_path) / "escape.txt").exists()
    transfers.__dict__["s3"] = FakeS3({"b/m": b'{"not": "a list"}'})
    with pytest.raises(TransferError, match="is not a list"):
        transfers.download("s3://b/m", "ManifestFile", tmp_path / "channel")


def policy(kind: str, wait: int, last: int, **size) -> dict:
    return {
        "TrafficRoutingConfiguration": {"Type": kind, "WaitIntervalInSeconds": wait} | size,
        "TerminationWaitInSeconds": last,
    }


def test_traffic_shifts():
    assert steps(policy("ALL_AT_ONCE", 0, 9), 2) == [(1.0, 9.0)]
    assert steps(policy("CANARY", 60, 9, CanarySize={"Type": "CAPACITY_PERCENT", "Value": 30}), 2) == [
        (0.3, 60.0),
        (1.0, 9.0),
    ]
    assert steps(policy("LINEAR", 5, 9, LinearStepSize={"Type": "INSTANCE_COUNT", "Value": 1}), 3) == [
        (pytest.approx(1 / 3), 5.0),
        (pytest.approx(2 / 3), 5.0),
        (1.0, 9.0),
    ]
    assert steps(policy("LINEAR", 5, 9, LinearStepSize={"Type": "CAPACITY_PERCENT", "Value": 40}), 3) == [
        (0.4, 5.0),
        (0.8, 5.0),
        (1.0, 9.0),
    ]


def test_weighted_choice_is_exact_over_short_stretches():
    class Item:
        credit = 0.0

    a, b = Item(), Item()
    chosen = [smooth_choice([a, b], [0.75, 0.25]) for _ in range(8)]
    assert chosen.count(b) == 2 and chosen[:4].count(b) == 1
