"""The functions that the workflow calls: publishing, probing, replaying, cleaning up."""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common import aws as aws_module
from common import endpoint
from common.errors import EndpointTrouble
from end_run import app as end_run
from probe_endpoint import app as probe
from publish_sources import app as publish
from tests.makers import events

PREPROCESS = {"size": 32, "resize": 37, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}


def layer(root: Path, package: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_sources_are_published_once_under_the_hash_of_their_content(aws, context, monkeypatch, tmp_path):
    layer(tmp_path, "training_source", {"train.py": "print(1)", "smdebug.whl": "wheel"})
    layer(tmp_path, "serving_source", {"server.py": "1", "preprocessing.py": "2"})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    published = publish.handler({}, context)
    assert published["weights"] is None and published["serving"]["image"] == "local/inference:latest"
    key = published["code"]["archive"].removeprefix(f"s3://{aws.artifacts}/")
    with tarfile.open(fileobj=io.BytesIO(aws.s3.get_object(Bucket=aws.artifacts, Key=key)["Body"].read())) as tar:
        assert sorted(tar.getnames()) == ["preprocessing.py", "smdebug.whl", "train.py"]
    listed = [o["Key"] for o in aws.s3.list_objects_v2(Bucket=aws.artifacts)["Contents"]]
    assert not [k for k in listed if "/files/" in k and k.endswith(".whl")]
    assert publish.handler({}, context) == published
    assert len(aws.s3.list_object_versions(Bucket=aws.artifacts)["Versions"]) == len(listed)
    layer(tmp_path, "training_source", {"train.py": "print(2)"})
    assert publish.handler({}, context)["code"]["hash"] != published["code"]["hash"]


def test_without_weights_and_network_the_error_says_what_to_do(aws, context, monkeypatch):
    monkeypatch.setattr(publish, "WEIGHTS_URL", "http://127.0.0.1:9/none")
    with pytest.raises(publish.WeightsUnavailable, match="PretrainedWeights=none"):
        publish.publish_weights(aws.artifacts)


def test_a_function_without_its_layer_says_so():
    with pytest.raises(publish.NoSource, match="build and deploy"):
        publish.files_of("no_such_layer")


def test_probes_count_failures_and_do_not_raise(aws, context, monkeypatch):
    out = io.BytesIO()
    Image.new("RGB", (40, 40)).save(out, "PNG")
    aws.s3.put_object(Bucket=aws.artifacts, Key="images/abc", Body=out.getvalue())
    manifest = json.dumps([{"prefix": f"s3://{aws.artifacts}/images/"}, "abc"])
    aws.s3.put_object(Bucket=aws.artifacts, Key="datasets/1/test.manifest", Body=manifest)
    answers = iter([None, EndpointTrouble("down"), None])

    def ask(name: str, crops: list[bytes]) -> None:
        assert [len(crop) for crop in crops] == [32 * 32 * 3]
        if error := next(answers):
            raise error

    monkeypatch.setattr(endpoint, "classify", ask)
    request = {
        "endpoint": "houndloop", "bucket": aws.artifacts, "manifest": "datasets/1/test.manifest",
        "preprocess": json.dumps(PREPROCESS), "requests": 3, "seconds": 0.01,
    }  # fmt: skip
    assert probe.handler(request, context) == {"sent": 3, "failed": 1}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    stopped: list[str] = []

    class SageMaker:
        def list_hyper_parameter_tuning_jobs(self, **_: Any) -> dict[str, Any]:
            return {"HyperParameterTuningJobSummaries": [{"HyperParameterTuningJobName": "houndloop-77-0"}]}

        def list_training_jobs(self, **_: Any) -> dict[str, Any]:
            return {"TrainingJobSummaries": [{"TrainingJobName": "houndloop-77-train-0"}]}

        def list_processing_jobs(self, **_: Any) -> dict[str, Any]:
            return {"ProcessingJobSummaries": []}

        def stop_hyper_parameter_tuning_job(self, HyperParameterTuningJobName: str) -> None:
            stopped.append(HyperParameterTuningJobName)

        def stop_training_job(self, TrainingJobName: str) -> None:
            stopped.append(TrainingJobName)

    client = aws_module.client
    monkeypatch.setattr(aws_module, "client", lambda name: SageMaker() if name == "sagemaker" else client(name))
    return stopped


@pytest.mark.parametrize("status", ["ABORTED", "TIMED_OUT", "FAILED"])
def test_a_run_that_ended_by_itself_frees_its_lock_and_stops_its_jobs(aws, context, jobs, status):
    event = events.document("execution_aborted")
    event["detail"]["status"] = status
    lock = {"pk": "lock", "sk": "lock", "holder": event["detail"]["executionArn"], "run": "77"}
    aws.state.put_item(Item=lock)
    assert end_run.handler(event, context)["freed"]
    assert jobs == ["houndloop-77-0", "houndloop-77-train-0"]
    assert "Item" not in aws.state.get_item(Key={"pk": "lock", "sk": "lock"})


def test_the_lock_of_another_run_stays(aws, context, jobs):
    aws.state.put_item(Item={"pk": "lock", "sk": "lock", "holder": "arn:another", "run": "78"})
    assert end_run.handler(events.document("execution_aborted"), context) == {"freed": False}
    assert jobs == [] and aws.state.get_item(Key={"pk": "lock", "sk": "lock"})["Item"]["run"] == "78"
