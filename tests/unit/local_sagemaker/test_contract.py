"""Path mapping, script mode and manifests: the pure parts of the container contract."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from local.sagemaker import toolkit
from local.sagemaker.container import Container
from local.sagemaker.transfers import Cancelled, Mirror, TransferError, Transfers, relative_name, split


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


@pytest.fixture
def recorded() -> dict:
    """What AWS's toolkit gave a script for one job, recorded with sagemaker-training itself."""
    return json.loads(Path(__file__).with_name("toolkit.json").read_text())


def job(recorded: dict, container: Container) -> dict:
    """The recorded job's description, and its channels where the toolkit finds them."""
    given = recorded["job"]
    container.write_config("inputdataconfig", given["inputdataconfig"])
    return {
        "TrainingJobName": given["TrainingJobName"],
        "ResourceConfig": {"InstanceType": given["resourceconfig"]["current_instance_type"]},
        "HyperParameters": given["HyperParameters"],
        "InputDataConfig": [{"ChannelName": name} for name in given["inputdataconfig"]],
    }


def here(text: str, container: Container) -> str:
    """A recorded text with what is different here on purpose: paths, the network interface, the share of the cores."""
    text = text.replace("/opt/ml/input/data/training", "{base}/input/data/training").replace("eth0", "lo")
    return text.replace("{base}", str(container.opt_ml)).replace("{python}", sys.executable).replace("{cpus}", "3")


def test_variables_are_those_that_the_toolkit_sets(recorded, container):
    record = job(recorded, container)
    own = container.localised_values(toolkit.user_hyperparameters(record["HyperParameters"]))
    env = toolkit.environment(container, record, toolkit.arguments(own), cpus=3)
    wanted = {
        name: here(value, container)
        for name, value in recorded["script"]["env"].items()
        if name != "PYTHONPATH" and not name.startswith(("NCCL_", "MASTER_"))
    }
    assert env == wanted


def test_arguments_are_those_that_the_toolkit_passes(recorded, container):
    own = container.localised_values(toolkit.user_hyperparameters(recorded["job"]["HyperParameters"]))
    wanted = [here(word, container) for word in recorded["script"]["argv"]]
    assert toolkit.command(container, "train.py", toolkit.arguments(own), "python") == ["python", "--", *wanted]


def test_what_is_no_python_script_is_run_by_the_shell(recorded, container):
    container.code.mkdir()
    (container.code / "train.sh").write_text("#!/bin/sh\n")
    words = toolkit.arguments({"lr": 0.1, "name": "a b"})
    argv = toolkit.command(container, "train.sh", words, "python")
    assert argv[:2] == ["/bin/sh", "-c"] and shlex.split(argv[2]) == recorded["argv"]["shell"]
    assert os.access(container.code / "train.sh", os.X_OK)


def test_entry_points_outside_the_source_are_refused(recorded, container):
    assert "../train.py" in recorded["refused"]
    for program in recorded["refused"]:
        with pytest.raises(toolkit.EntryPointError, match="cannot be used"):
            toolkit.command(container, program, [], "python")


def test_failures_are_told_from_the_first_line_that_names_an_error():
    log = ["start", "Traceback (most recent call last):", '  File "x.py", line 1, in f', "    raise ValueError('bad')"]
    text = toolkit.failure([*log, "ValueError: bad"], ["python", "--", "train.py"], 1, 1000)
    assert text == (
        "ExecuteUserScriptError:\nExitCode 1\nErrorMessage \"raise ValueError('bad')\n ValueError: bad\"\n"
        'Command "python -- train.py"'
    )
    assert len(toolkit.failure(["ValueError: " + "x" * 5000], ["python"], 1, 900)) == 900


def test_what_the_environment_lacks_is_named():
    wanted = "\n".join(
        [
            "# a comment",
            "-r other.txt",
            "pytest  # is there",
            "pytest<1",
            "no-such-package>=2",
            'other-package; python_version < "3"',
            "./a/path",
        ]
    )
    first, second = toolkit.unsatisfied(wanted)
    assert first.startswith("pytest<1 (") and second == "no-such-package>=2 (not installed)"


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
    """get_object, put_object and a listing over a dict; what is asked of it beyond that fails."""

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

    def put_object(self, Bucket: str, Key: str, Body) -> None:  # noqa: N803
        self.objects[f"{Bucket}/{Key}"] = Body.read()


def transfers(objects: dict[str, bytes]) -> Transfers:
    """S3 with these objects (bucket/key: content)."""
    made = Transfers({"AWS_REGION": "us-east-1"}, "role")
    made.__dict__["s3"] = FakeS3(objects)
    return made


def test_a_manifest_that_would_leave_the_channel_is_refused(tmp_path):
    manifest = json.dumps([{"prefix": "s3://b/p/"}, "../../escape.txt"]).encode()
    with pytest.raises(TransferError, match="leaves the channel"):
        transfers({"b/m": manifest, "b/p/../../escape.txt": b"x"}).download("s3://b/m", "ManifestFile", tmp_path / "c")
    assert not (Path(tmp_path) / "escape.txt").exists()
    with pytest.raises(TransferError, match="is not a list"):
        transfers({"b/m": b'{"not": "a list"}'}).download("s3://b/m", "ManifestFile", tmp_path / "c")


def test_a_manifest_joins_prefix_and_name_as_they_stand(tmp_path):
    manifest = json.dumps([{"prefix": "s3://b/p/day-"}, "1/a.txt", "2/b.txt"]).encode()
    s3 = transfers({"b/m": manifest, "b/p/day-1/a.txt": b"a", "b/p/day-2/b.txt": b"b"})
    assert s3.download("s3://b/m", "ManifestFile", tmp_path) == 2
    assert (tmp_path / "1" / "a.txt").read_bytes() == b"a" and (tmp_path / "2" / "b.txt").read_bytes() == b"b"


def test_a_key_that_is_the_folder_of_another_fails_the_download(tmp_path):
    manifest = json.dumps([{"prefix": "s3://b/"}, "a", "a/b"]).encode()
    with pytest.raises(TransferError, match="ClientError: Data download failed:"):
        transfers({"b/m": manifest, "b/a": b"x", "b/a/b": b"y"}).download("s3://b/m", "ManifestFile", tmp_path)


def test_a_download_ends_when_its_job_is_stopped(tmp_path):
    s3 = transfers({"b/m": json.dumps([{"prefix": "s3://b/"}, "a"]).encode(), "b/a": b"x"})
    s3.cancelled = lambda: True
    with pytest.raises(Cancelled):
        s3.download("s3://b/m", "ManifestFile", tmp_path)


def test_a_mirror_sends_each_state_of_a_file_once(tmp_path):
    objects: dict[str, bytes] = {}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one").write_bytes(b"1")
    mirror = Mirror(transfers(objects), tmp_path, "s3://b/here/")
    assert mirror.sync(settled=True) == 0  # it may still be written
    assert mirror.sync(settled=True) == 1 and objects == {"b/here/sub/one": b"1"}
    assert mirror.sync(settled=True) == mirror.sync() == 0
    (tmp_path / "sub" / "one").write_bytes(b"22")
    (tmp_path / "two").write_bytes(b"2")
    assert mirror.sync() == 2 and objects == {"b/here/sub/one": b"22", "b/here/two": b"2"}
    assert Mirror(transfers(objects), tmp_path / "not-there", "s3://b/x").sync() == 0
