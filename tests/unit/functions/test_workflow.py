"""The functions that the workflow calls: publishing, judging, probing, replaying, cleaning up."""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common import endpoint
from common.errors import EndpointTrouble
from judge_challenger import app as judge
from probe_endpoint import app as probe
from publish_sources import app as publish

THRESHOLDS = judge.Thresholds(accuracy_floor=0.5, margin=0.02, new_class_floor=0.3)
CLEAN = {"blocking": False, "rules": []}
PREPROCESS = {"size": 32, "resize": 37, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}


def evaluation(challenger: int, champion: int | None, new: dict[str, tuple[int, int]] | None = None) -> dict[str, Any]:
    """100 test pictures of known classes, `challenger` and `champion` of them right, and those of new classes."""
    new = new or {}
    right = challenger + sum(correct for correct, _ in new.values())
    total = 100 + sum(n for _, n in new.values())
    return {
        "challenger": {
            "accuracy": right / total, "preprocess": PREPROCESS,
            "per_class": {name: {"n": n, "correct": correct} for name, (correct, n) in new.items()},
        },
        "champion": None if champion is None else {"accuracy": champion / 100},
        "common_classes": ["beagle"], "new_classes": list(new) if champion is not None else [],
        "common": champion and {"n": 100, "challenger_correct": challenger, "champion_correct": champion},
        "precision": {"chosen": "int8", "reason": "served in int8; 2.9 times as fast as f32"},
    }  # fmt: skip


def test_the_first_model_needs_only_the_floor():
    assert judge.judge(evaluation(60, None), CLEAN, THRESHOLDS)["promote"]
    verdict = judge.judge(evaluation(40, None), CLEAN, THRESHOLDS)
    assert not verdict["promote"] and "under the floor of 50.0%" in verdict["sentence"]


def test_the_precision_is_passed_on_and_told_where_the_model_is_to_be_served():
    verdict = judge.judge(evaluation(60, None), CLEAN, THRESHOLDS)
    assert verdict["precision"] == "int8" and verdict["sentence"].endswith("; served in int8; 2.9 times as fast as f32")
    assert "int8" not in judge.judge(evaluation(40, None), CLEAN, THRESHOLDS)["sentence"]


def test_a_challenger_may_be_worse_by_the_margin_and_no_more():
    assert judge.judge(evaluation(88, 90), CLEAN, THRESHOLDS)["promote"]
    verdict = judge.judge(evaluation(87, 90), CLEAN, THRESHOLDS)
    assert not verdict["promote"] and "3.0% worse than the champion on the 100 test pictures" in verdict["sentence"]


def test_a_new_class_must_be_recognised():
    assert judge.judge(evaluation(90, 90, {"pug": (3, 10)}), CLEAN, THRESHOLDS)["promote"]
    verdict = judge.judge(evaluation(90, 90, {"pug": (2, 10)}), CLEAN, THRESHOLDS)
    assert not verdict["promote"] and "new class pug: 2 of 10" in verdict["sentence"]


def test_a_blocking_finding_blocks():
    findings = {"blocking": True, "rules": [{"rule": "ExplodingTensor", "blocking": True, "status": "IssuesFound"}]}
    verdict = judge.judge(evaluation(100, 50), findings, THRESHOLDS)
    assert not verdict["promote"] and "ExplodingTensor" in verdict["sentence"]


def test_the_verdict_is_written_where_people_find_it(aws, context, monkeypatch):
    for name, value in {"ACCURACY_FLOOR": "0.5", "GATE_MARGIN": "0.02", "NEW_CLASS_FLOOR": "0.3"}.items():
        monkeypatch.setenv(name, value)
    aws.s3.put_object(Bucket=aws.artifacts, Key="runs/1/evaluation.json", Body=json.dumps(evaluation(90, 80)))
    request = {
        "bucket": aws.artifacts,
        "evaluation": "runs/1/evaluation.json",
        "verdict": "runs/1/verdict.json",
        "findings": CLEAN,
    }
    verdict = judge.handler(request, context)
    written = json.loads(aws.s3.get_object(Bucket=aws.artifacts, Key="runs/1/verdict.json")["Body"].read())
    assert written == verdict and json.loads(verdict["preprocess"]) == PREPROCESS


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
