"""The functions that the workflow calls: publishing, probing, replaying, cleaning up."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from common import endpoint, runs
from common.errors import EndpointTrouble
from local.demo import loop, settings
from probe_endpoint import app as probe
from publish_sources import app as publish

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


def test_the_demo_has_the_same_weights_and_run_ids():
    assert settings.WEIGHTS_URL == publish.WEIGHTS_URL
    assert settings.WEIGHTS_SHA256 == publish.WEIGHTS_SHA256_START
    assert loop.RUN_ID == runs.RUN_ID


def test_a_function_without_its_layer_says_so():
    with pytest.raises(publish.NoSource, match="build and deploy"):
        publish.files_of("no_such_layer")


def test_probes_count_failures_and_do_not_raise(aws, context, monkeypatch):
    out = io.BytesIO()
    Image.new("RGB", (40, 6)).save(out, "PNG")  # which a stack with a MinImageSide of 6 accepts as a label
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
