"""From labelled objects to a run: the ledger, the quiet period, the dataset."""

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common import aws as aws_module
from common import dataset, ledger
from common.events import ObjectEvent
from register_labels import app as register
from snapshot_dataset import app as snapshot
from start_retraining import app as start
from tests.makers import events


def picture(seed: int) -> bytes:
    """Noise in blocks, so that no two look alike."""
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((72, 72), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


def put(aws: Any, key: str, data: bytes, sequencer: str = "01") -> str:
    version = aws.s3.put_object(Bucket=aws.bucket, Key=key, Body=data)["VersionId"]
    return events.object_created(aws.bucket, key, sequencer=sequencer, size=len(data), version=version)


def label(aws: Any, context: Any, class_name: str, seeds: range) -> None:
    bodies = [put(aws, f"labelled/{class_name}/{seed}.png", picture(seed)) for seed in seeds]
    for first in range(0, len(bodies), 10):
        assert register.handler(events.sqs_batch(*bodies[first : first + 10]), context) == {"batchItemFailures": []}


def item(aws: Any, key: str) -> dict[str, Any] | None:
    return aws.labels.get_item(Key={"pk": f"label#{aws.bucket}/{key}"}).get("Item")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Executions that were started."""
    calls: list[dict[str, Any]] = []

    class StepFunctions:
        def start_execution(self, **request: Any) -> None:
            calls.append(request)

        def describe_execution(self, executionArn: str) -> dict[str, str]:
            return {"status": "RUNNING"}

    monkeypatch.setenv("RETRAIN_STATE_MACHINE", "arn:machine")
    client = aws_module.client
    monkeypatch.setattr(aws_module, "client", lambda name: StepFunctions() if name == "stepfunctions" else client(name))
    return calls


def test_a_label_is_recorded_and_its_picture_kept_by_content(aws, context):
    label(aws, context, "beagle", range(1))
    row = item(aws, "labelled/beagle/0.png")
    assert (row["class"], row["status"], row["split"]) == ("beagle", "ACTIVE", "train")
    kept = aws.s3.get_object(Bucket=aws.artifacts, Key=f"images/{row['sha256']}")["Body"].read()
    assert kept == picture(0)


def test_a_repeated_event_is_no_change(aws, context):
    body = put(aws, "labelled/beagle/1.png", picture(1))
    for _ in range(2):
        register.handler(events.sqs_batch(body), context)
    assert ledger.read().revision == 1


def test_an_older_event_changes_nothing_and_a_deletion_counts(aws, context):
    first = put(aws, "labelled/beagle/1.png", picture(1), "01")
    gone = events.object_deleted(aws.bucket, "labelled/beagle/1.png", sequencer="02")
    for body in (gone, first):
        register.handler(events.sqs_batch(body), context)
    assert item(aws, "labelled/beagle/1.png")["status"] == "DELETED" and list(ledger.active_labels()) == []


def test_an_old_version_that_is_erased_takes_no_label_with_it_and_the_labelled_one_does(aws, context):
    key = "labelled/beagle/1.png"
    old, new = put(aws, key, picture(1), "01"), put(aws, key, picture(2), "02")
    versions = [ObjectEvent.from_body(body).version_id for body in (old, new)]
    by_lifecycle = events.object_deleted(aws.bucket, key, sequencer="03", erased=versions[0])
    for body in (by_lifecycle, old, new, by_lifecycle):
        register.handler(events.sqs_batch(body), context)
    assert item(aws, key)["status"] == "ACTIVE" and ledger.read().revision == 2
    by_hand = events.object_deleted(aws.bucket, key, sequencer="04", erased=versions[1])
    register.handler(events.sqs_batch(by_hand), context)
    assert item(aws, key)["status"] == "DELETED"


def test_a_file_over_the_limit_is_no_label_and_is_not_fetched(aws, context, monkeypatch):
    monkeypatch.setenv("MAX_IMAGE_BYTES", "10")
    monkeypatch.setattr(register, "fetch", lambda event: pytest.fail("fetched"))
    register.handler(events.sqs_batch(put(aws, "labelled/beagle/1.png", picture(1))), context)
    assert "larger than" in item(aws, "labelled/beagle/1.png")["reason"]


@pytest.mark.parametrize(
    ("key", "data", "reason"),
    [
        ("labelled/stray.png", picture(1), "no class folder"),
        ("labelled/<script>/1.png", picture(1), "no class name"),
        ("labelled/beagle/notes.txt", b"hello", "not an image"),
    ],
)
def test_what_is_no_label_is_recorded_with_the_reason(aws, context, key, data, reason):
    assert register.handler(events.sqs_batch(put(aws, key, data)), context) == {"batchItemFailures": []}
    row = item(aws, key)
    assert row["status"] == "REJECTED" and reason in row["reason"]


def test_a_folder_marker_is_no_label(aws, context):
    register.handler(events.sqs_batch(events.object_created(aws.bucket, "labelled/beagle/", size=0)), context)
    assert ledger.read() is None


def test_look_alikes_share_a_split_and_a_class_gets_all_three(aws, context):
    label(aws, context, "beagle", range(10))
    rescaled = io.BytesIO()
    Image.open(io.BytesIO(picture(1))).resize((144, 144), Image.Resampling.NEAREST).save(rescaled, "PNG")
    register.handler(events.sqs_batch(put(aws, "labelled/beagle/1b.png", rescaled.getvalue())), context)
    splits = [row["split"] for row in ledger.active_labels()]
    assert {s: splits.count(s) for s in set(splits)}.keys() == {"train", "validation", "test"}
    one, again = item(aws, "labelled/beagle/1.png"), item(aws, "labelled/beagle/1b.png")
    assert one["phash"] == again["phash"] and one["split"] == again["split"] and one["sha256"] != again["sha256"]


def test_two_bursts_of_labels_make_one_run(aws, context, started):
    label(aws, context, "beagle", range(10))
    label(aws, context, "boxer", range(20, 30))
    revisions = [
        json.loads(message["Body"])["revision"]
        for message in aws.sqs.receive_message(QueueUrl=aws.queues["retrain"], MaxNumberOfMessages=10)["Messages"]
    ]
    assert len(revisions) == 2
    batch = events.sqs_batch(*(json.dumps({"revision": revision}) for revision in revisions))
    for _ in range(2):  # and SQS may deliver twice
        start.handler(batch, context)
    assert len({call["name"] for call in started}) == 1


def test_too_few_pictures_start_nothing_and_the_reason_counts_what_is_missing(aws, context, started):
    label(aws, context, "beagle", range(10))
    label(aws, context, "boxer", range(20, 23))
    reason = start.consider(ledger.read().revision)
    assert started == [] and "boxer has 3 of the 5 pictures a class needs: 2 missing" in reason


def test_a_trained_dataset_is_not_trained_again(aws, context, started):
    label(aws, context, "beagle", range(10))
    label(aws, context, "boxer", range(20, 30))
    taken = snapshot.handler({}, context)
    assert not taken["trained"]
    last = {"trained_at": taken["takenAt"], "classes": json.dumps(taken["classes"])}
    for sk in (taken["hash"], "last"):
        aws.state.put_item(Item={"pk": "dataset", "sk": sk, **last})
    assert start.consider(ledger.read().revision) == "no labels wait", "a snapshot has them"
    label(aws, context, "pug", range(40, 42))  # too few to take part
    assert "trained already" in start.consider(ledger.read().revision) and started == []
    assert snapshot.handler({}, context)["trained"]


def test_a_snapshot_lists_pictures_by_content(aws, context):
    label(aws, context, "boxer", range(10))
    label(aws, context, "beagle", range(20, 30))
    label(aws, context, "pug", range(40, 42))
    taken = snapshot.handler({}, context)
    assert taken["classes"] == ["beagle", "boxer"] and taken["counts"] == {"beagle": 10, "boxer": 10}
    assert "pug has 2 of the 5" in taken["leftOut"][0]
    prefix = f"datasets/{taken['hash']}"
    read = lambda name: aws.s3.get_object(Bucket=aws.artifacts, Key=f"{prefix}/{name}")["Body"].read()  # noqa: E731
    lines = [json.loads(line) for line in read("manifest.jsonl").splitlines()]
    test_names = json.loads(read("test.manifest"))
    assert test_names[0] == {"prefix": f"s3://{aws.artifacts}/images/"}
    assert sorted(test_names[1:]) == sorted(line["sha256"] for line in lines if line["split"] == "test")


def test_a_snapshot_of_one_class_says_what_is_missing(aws, context):
    label(aws, context, "beagle", range(10))
    with pytest.raises(snapshot.TooFewPictures, match="two classes or more, 1 can take part"):
        snapshot.handler({}, context)


# A picture's split is its group's, so it follows from the content.
labels = st.lists(
    st.builds(
        lambda sha, name, number: {
            "sha256": sha,
            "class": name,
            "split": dataset.SPLITS[ord(sha) % 3],
            "bucket": "b",
            "key": f"labelled/{name}/{number}",
        },
        st.sampled_from("abcdefghijklmnopq"),
        st.sampled_from(["x", "y", "z"]),
        st.integers(0, 9),
    ),
    max_size=60,
)


@given(labels, st.randoms())
def test_a_dataset_depends_on_content_not_on_order(items, random):
    one, two = dataset.assemble(items, 2), dataset.assemble(random.sample(items, len(items)), 2)
    assert one.classes == two.classes and one.hash == two.hash and one.manifest() == two.manifest()


@given(labels)
def test_no_picture_is_in_a_dataset_twice_or_under_two_classes(items):
    found = dataset.assemble(items, 2)
    contents = [picture.sha256 for picture in found.pictures]
    assert len(contents) == len(set(contents))
    for one in found.pictures:
        assert {i["class"] for i in items if i["sha256"] == one.sha256} == {one.class_name}


def test_event_order_is_immaterial_for_labels(aws, context):
    first = put(aws, "labelled/beagle/1.png", picture(1), "01")
    second = put(aws, "labelled/beagle/1.png", picture(2), "02")
    register.handler(events.sqs_batch(second, first), context)
    assert item(aws, "labelled/beagle/1.png")["sequencer"] == ObjectEvent.from_body(second).sequencer
