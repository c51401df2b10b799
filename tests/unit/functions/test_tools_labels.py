"""tools/labels.py: what it says about labels, and predictions that a person confirms or corrects."""

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common import ledger
from register_labels import app as register
from snapshot_dataset import app as snapshot
from tests.makers import events
from tools import labels, stack


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((72, 72), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def outputs(aws: SimpleNamespace) -> dict[str, str]:
    return {
        "DataBucketName": aws.bucket, "PredictionsTableName": "Predictions", "LabelsTableName": "Labels",
        "LoopStateTableName": "LoopState",
    }  # fmt: skip


def classified(aws: Any, key: str, data: bytes, **more: Any) -> str:
    """A picture and its row, as classify_images leaves them; returns the version."""
    version = aws.s3.put_object(Bucket=aws.bucket, Key=key, Body=data)["VersionId"]
    row = {
        "image": f"{aws.bucket}/{key}", "version": "current", "bucket": aws.bucket, "key": key, "version_id": version,
        "sequencer": "1", "status": "CLASSIFIED", "label": "beagle", "review": "review", "confidence": 0,
    }  # fmt: skip
    aws.predictions.put_item(Item=row | more)
    return version


def row(aws: Any, key: str) -> dict[str, Any]:
    return aws.predictions.get_item(Key={"image": f"{aws.bucket}/{key}", "version": "current"})["Item"]


def labelled(aws: Any) -> dict[str, bytes]:
    found = aws.s3.list_objects_v2(Bucket=aws.bucket, Prefix="labelled/").get("Contents", [])
    return {e["Key"].split("/")[1]: aws.s3.get_object(Bucket=aws.bucket, Key=e["Key"])["Body"].read() for e in found}


def test_what_is_confirmed_becomes_a_label_and_awaits_review_no_longer(aws, outputs, capsys):
    classified(aws, "inbox/my dogs/ä b+c%20.png", picture(1))
    assert labels.review(outputs, "my dogs/ä b+c%20.png", None) == 0
    assert labelled(aws) == {"beagle": picture(1)}
    reviewed = row(aws, "inbox/my dogs/ä b+c%20.png")
    assert "review" not in reviewed and reviewed["reviewed_as"] == "beagle" and reviewed["reviewed_at"]
    assert "is labelled beagle" in capsys.readouterr().out


def test_a_second_correction_replaces_the_first_whatever_broke_off_between(aws, outputs):
    classified(aws, "inbox/rex.png", picture(1))
    labels.review(outputs, "inbox/rex.png", "boxer")
    labels.review(outputs, "rex.png", " great   dane")
    labels.review(outputs, "rex.png", "great dane")
    assert labelled(aws) == {"great dane": picture(1)} and row(aws, "inbox/rex.png")["reviewed_as"] == "great dane"
    versions = aws.s3.list_object_versions(Bucket=aws.bucket, Prefix="labelled/great dane/")["Versions"]
    assert len(versions) == 1, "nothing is copied twice"


def test_the_label_is_of_the_version_that_the_row_speaks_of(aws, outputs):
    classified(aws, "inbox/rex.png", picture(1))
    aws.s3.put_object(Bucket=aws.bucket, Key="inbox/rex.png", Body=picture(2))
    aws.s3.delete_object(Bucket=aws.bucket, Key="inbox/rex.png")
    labels.review(outputs, "rex.png", "boxer")
    assert labelled(aws) == {"boxer": picture(1)}


def test_each_version_of_a_picture_has_a_label_of_its_own(aws, outputs):
    for seed, name in ((1, "boxer"), (2, "pug")):
        classified(aws, "inbox/rex.png", picture(seed))
        labels.review(outputs, "rex.png", name)
    assert labelled(aws) == {"boxer": picture(1), "pug": picture(2)}


def test_a_picture_that_is_replaced_meanwhile_keeps_its_mark(aws, outputs, monkeypatch):
    classified(aws, "inbox/rex.png", picture(1))
    place = labels.place

    def replaced(found: dict[str, Any], key: str) -> None:
        place(found, key)
        classified(aws, "inbox/rex.png", picture(2))

    monkeypatch.setattr(labels, "place", replaced)
    with pytest.raises(stack.ToolError, match="replaced meanwhile"):
        labels.review(outputs, "rex.png", "boxer")
    assert row(aws, "inbox/rex.png")["review"] and "reviewed_as" not in row(aws, "inbox/rex.png")
    assert labelled(aws) == {"boxer": picture(1)}


@pytest.mark.parametrize(
    ("more", "corrected", "reason"),
    [
        ({"status": "WAITING"}, None, "no class to confirm"),
        ({"status": "REJECTED", "reason": "not an image"}, "boxer", "not an image"),
        ({}, "<b>", "is no class name"),
        ({}, "Great_Dane", "There is a class 'great dane'"),
        ({}, "PUG", "There is a class 'pug'"),
        ({"version_id": "gone"}, "boxer", "no longer kept"),
    ],
)
def test_what_cannot_be_reviewed_says_why(aws, outputs, more, corrected, reason):
    classified(aws, "inbox/rex.png", picture(1), **more)
    aws.state.put_item(Item={"pk": "champion", "sk": "champion", "classes": '["great dane"]'})
    ledger.first_spelling("pug")
    with pytest.raises(stack.ToolError, match=reason):
        labels.review(outputs, "rex.png", corrected)
    assert labelled(aws) == {}


def test_a_picture_without_a_row_says_so(aws, outputs):
    with pytest.raises(stack.ToolError, match="There is no row of inbox/rex.png"):
        labels.review(outputs, "rex.png", None)


def label(aws: Any, context: Any, key: str, data: bytes) -> None:
    version = aws.s3.put_object(Bucket=aws.bucket, Key=key, Body=data)["VersionId"]
    body = events.object_created(aws.bucket, key, sequencer="01", size=len(data), version=version)
    register.handler(events.sqs_batch(body), context)


def test_show_says_what_a_run_would_learn_from_and_what_not_and_why(aws, context, outputs, capsys):
    for name, first in (("beagle", 0), ("boxer", 10)):
        for seed in range(first, first + 5):
            label(aws, context, f"labelled/{name}/{seed}.png", picture(seed))
    label(aws, context, "labelled/pug/0.png", picture(20))
    label(aws, context, "labelled/Boxer/1.png", picture(21))
    label(aws, context, "labelled/beagle/both.png", picture(22))
    label(aws, context, "labelled/boxer/both.png", picture(22))
    label(aws, context, "labelled/beagle/notes.txt", b"hello")
    label(aws, context, "labels/a.csv", b"picture,class")
    assert labels.show(20) == 0
    told = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:6] for line in told.splitlines() if line[:5] in ("beagl", "boxer", "pug  ")}
    assert rows["beagle"] == ["6", "6", "3", "1", "1"] and rows["boxer"] == ["6", "6", "3", "1", "1"]
    for line in (
        "pug has 1 of the 5 pictures a class needs: 4 missing",
        "1 pictures are labelled 'Boxer', which is another spelling of 'boxer'",
        "labels/a.csv: it is neither",
        "labelled/beagle/notes.txt: not an image",
        "labelled/beagle/both.png, s3://pictures/labelled/boxer/both.png: the same picture is labelled beagle and",
        "A run would learn from 10 pictures of 2 classes",
        "The labels are reason for a run: the first run, on 10 pictures of 2 classes.",
    ):
        assert line in told, told
    assert ledger.contents().splits.of == {}, "showing decides nothing"


def test_show_says_what_is_new_to_the_last_training_whatever_the_champion_knows(aws, context, outputs, capsys):
    """A model that was rejected learned from its pictures, too: they start no other run."""
    for name, first in (("beagle", 0), ("boxer", 10)):
        for seed in range(first, first + 5):
            label(aws, context, f"labelled/{name}/{seed}.png", picture(seed))
    taken = snapshot.handler({}, context)
    aws.state.put_item(Item={"pk": "dataset", "sk": "last", "hash": taken["hash"], "outcome": "REJECTED"})
    aws.state.put_item(Item={"pk": "champion", "sk": "champion", "classes": '["beagle"]'})
    label(aws, context, "labelled/boxer/new.png", picture(20))
    labels.show(20)
    told = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:3] for line in told.splitlines() if line[:6] in ("beagle", "boxer ")}
    assert rows == {"beagle": ["5", "0"], "boxer": ["6", "1"]}
    assert "The labels are reason for a run: 1 new picture of known classes, and 1 are enough." in told
    aws.state.put_item(Item={"pk": "dataset", "sk": snapshot.handler({}, context)["hash"]})
    labels.show(20)
    assert "The labels start no run: this very dataset was trained already" in capsys.readouterr().out


def test_show_before_there_is_anything(aws, outputs, capsys):
    labels.show(20)
    assert "The labels start no run: training needs two classes" in capsys.readouterr().out
