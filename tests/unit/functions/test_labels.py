"""From labelled objects to a run: the ledger, the quiet period, the dataset."""

import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from PIL import Image

from common import aws as aws_module
from common import ledger, splits
from common.events import ObjectEvent
from common.objects import put_if_absent
from register_labels import app as register
from register_labels import pictures
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


def label(aws: Any, context: Any, class_name: str, seeds: Iterable[int]) -> None:
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
    assert (row["class"], row["status"]) == ("beagle", "ACTIVE")
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
    assert item(aws, "labelled/beagle/1.png")["status"] == "DELETED" and ledger.contents().labels == []


def test_an_old_version_that_is_erased_takes_no_label_with_it(aws, context):
    key = "labelled/beagle/1.png"
    old, new = put(aws, key, picture(1), "01"), put(aws, key, picture(2), "02")
    by_lifecycle = erase(aws, key, old, "03")
    for body in (old, new, by_lifecycle):
        register.handler(events.sqs_batch(body), context)
    assert (
        item(aws, key)["version_id"] == ObjectEvent.from_body(new).version_id and item(aws, key)["status"] == "ACTIVE"
    )
    assert ledger.read().revision == 1, "the first was gone already, and its end changed nothing"


def test_what_shows_again_when_the_newest_is_erased_is_the_label_again(aws, context):
    """A version under the one that is deleted for good, or what a delete marker hid."""
    key = "labelled/beagle/1.png"
    old, new = put(aws, key, picture(1), "01"), put(aws, key, picture(2), "02")
    register.handler(events.sqs_batch(old, new), context)
    register.handler(events.sqs_batch(erase(aws, key, new, "03")), context)
    assert (
        item(aws, key)["version_id"] == ObjectEvent.from_body(old).version_id and item(aws, key)["status"] == "ACTIVE"
    )
    marker = aws.s3.delete_object(Bucket=aws.bucket, Key=key)["VersionId"]
    register.handler(events.sqs_batch(events.object_deleted(aws.bucket, key, sequencer="04")), context)
    assert ledger.contents().labels == []
    aws.s3.delete_object(Bucket=aws.bucket, Key=key, VersionId=marker)
    unhidden = events.object_deleted(aws.bucket, key, sequencer="05", erased=marker)
    register.handler(events.sqs_batch(unhidden), context)
    assert [label["key"] for label in ledger.contents().labels] == [key]
    register.handler(events.sqs_batch(erase(aws, key, old, "06")), context)
    assert ledger.contents().labels == []


def erase(aws: Any, key: str, body: str, sequencer: str) -> str:
    """Delete for good the version that an event made, and return the event of that."""
    version = ObjectEvent.from_body(body).version_id
    aws.s3.delete_object(Bucket=aws.bucket, Key=key, VersionId=version)
    return events.object_deleted(aws.bucket, key, sequencer=sequencer, erased=version)


def test_a_picture_that_the_function_cannot_hold_is_rejected_and_takes_no_other_with_it(aws, context, monkeypatch):
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "320")
    large = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(large, "PNG")
    bodies = [put(aws, "labelled/beagle/large.png", large.getvalue()), put(aws, "labelled/beagle/1.png", picture(1))]
    assert register.handler(events.sqs_batch(*bodies), context) == {"batchItemFailures": []}
    row = item(aws, "labelled/beagle/large.png")
    assert row["status"] == "REJECTED" and row["reason"].startswith("4000x4000 pixels take 0.1 GB to decode")
    assert item(aws, "labelled/beagle/1.png")["status"] == "ACTIVE"


def test_who_tries_again_asks_for_a_run_before_it_dies_of_the_same(aws, context, monkeypatch):
    """What an invocation recorded before something killed it, nobody has asked about."""

    class Killed(BaseException):
        pass

    def take(event: ObjectEvent) -> None:
        raise Killed

    bodies = [put(aws, f"labelled/beagle/{seed}.png", picture(seed)) for seed in range(2)]
    asked: list[int] = []
    monkeypatch.setattr("common.quiet.ask_again", lambda revision, delay: asked.append(revision))
    register.handler(events.sqs_batch(bodies[0]), context)
    monkeypatch.setattr(pictures, "take", take)
    for receives in (1, 2):
        with pytest.raises(Killed):
            register.handler(events.sqs_batch(bodies[1], receives=receives), context)
    assert asked == [1, 1]


def test_a_file_over_the_limit_is_no_label_and_is_not_fetched(aws, context, monkeypatch):
    monkeypatch.setenv("MAX_IMAGE_BYTES", "10")
    monkeypatch.setattr(pictures, "fetch", lambda event: pytest.fail("fetched"))
    register.handler(events.sqs_batch(put(aws, "labelled/beagle/1.png", picture(1))), context)
    assert "larger than" in item(aws, "labelled/beagle/1.png")["reason"]


@pytest.mark.parametrize("code", ["InvalidObjectState", "AccessDenied"])
def test_an_archived_picture_is_no_label_and_a_forbidden_one_is_tried_again(aws, context, monkeypatch, code):
    """Somebody can put permissions right."""

    def fetch(event: Any) -> None:
        raise ClientError({"Error": {"Code": code}}, "GetObject")

    monkeypatch.setattr(pictures, "fetch", fetch)
    body = put(aws, "labelled/beagle/1.png", picture(1))
    failures = register.handler(events.sqs_batch(body), context)["batchItemFailures"]
    if code == "AccessDenied":
        assert len(failures) == 1 and item(aws, "labelled/beagle/1.png") is None
        return
    row = item(aws, "labelled/beagle/1.png")
    assert failures == [] and row["status"] == "REJECTED"
    assert row["reason"] == f"s3://{aws.bucket}/labelled/beagle/1.png cannot be read: {code}"


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


def test_a_run_is_asked_for_again_as_long_as_labels_wait(aws, context):
    def asked() -> int:
        batch = aws.sqs.receive_message(QueueUrl=aws.queues["retrain"], MaxNumberOfMessages=10).get("Messages", [])
        return len(batch)

    body = put(aws, "labelled/beagle/1.png", picture(1))
    for _ in range(2):
        register.handler(events.sqs_batch(body), context)
    assert asked() == 2, "who recorded it may have died before it could ask"
    ledger.settle(1, "2026-11-22T12:00:00.000Z")
    register.handler(events.sqs_batch(body), context)
    assert asked() == 0


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the next calls of an operation fail with the codes given, one each; what is left of them."""
    codes: list[str] = []
    call = BaseClient._make_api_call  # type: ignore[attr-defined]

    def answer(self: Any, operation: str, request: dict[str, Any]) -> Any:
        if codes and operation == codes[0].partition(" ")[0]:
            raise ClientError({"Error": {"Code": codes.pop(0).partition(" ")[2]}}, operation)
        return call(self, operation, request)

    monkeypatch.setattr(BaseClient, "_make_api_call", answer)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return codes


def test_the_ledger_settles_although_a_label_is_being_written(aws, context, refuse):
    label(aws, context, "beagle", range(2))
    refuse += ["UpdateItem TransactionConflictException"] * 3
    ledger.settle(2, "2026-11-22T12:00:00.000Z")
    assert refuse == [] and ledger.read().waiting_since is None
    refuse += ["UpdateItem AccessDeniedException"]
    with pytest.raises(ClientError, match="AccessDenied"):
        ledger.settle(2, "2026-11-22T12:00:00.000Z")


def test_who_settles_late_makes_nothing_wait_that_another_settled(aws, context):
    label(aws, context, "beagle", range(2))
    ledger.settle(2, "2026-11-22T12:00:00.000Z")
    ledger.settle(1, "2026-11-22T11:00:00.000Z")
    assert ledger.read().waiting_since is None


def test_who_writes_the_same_at_the_same_time_tries_again(aws, refuse):
    refuse += ["PutObject ConditionalRequestConflict"] * 2
    put_if_absent(aws.artifacts, "images/a", b"a")
    assert refuse == [] and aws.s3.get_object(Bucket=aws.artifacts, Key="images/a")["Body"].read() == b"a"
    refuse += ["PutObject ConditionalRequestConflict"] * 9
    with pytest.raises(ClientError, match="ConditionalRequestConflict"):
        put_if_absent(aws.artifacts, "images/b", b"b")


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
    last = {"hash": taken["hash"], "trained_at": taken["takenAt"]}
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


def test_splits_are_kept_when_a_snapshot_is_taken_and_not_when_one_is_only_considered(aws, context, started):
    label(aws, context, "beagle", range(10))
    label(aws, context, "boxer", range(20, 30))
    start.consider(ledger.read().revision)
    assert ledger.contents().splits.of == {}
    taken = snapshot.handler({}, context)
    kept = ledger.contents().splits
    assert len(kept.of) == 20 and kept.dealt == {"beagle": 10, "boxer": 10}
    label(aws, context, "pug", range(40, 45))
    later = snapshot.handler({}, context)
    before, after = ({p["sha256"]: p["split"] for p in manifest(aws, t)} for t in (taken, later))
    assert before.items() < after.items() and ledger.contents().splits.dealt["pug"] == 5
    assert set(after.values()) == {"train", "validation", "test"}


def manifest(aws: Any, taken: dict[str, Any]) -> list[dict[str, str]]:
    body = aws.s3.get_object(Bucket=aws.artifacts, Key=f"datasets/{taken['hash']}/manifest.jsonl")["Body"]
    return [json.loads(line) for line in body.read().splitlines()]


def test_splits_beyond_one_item_are_kept_in_several(aws, monkeypatch):
    monkeypatch.setattr(ledger, "HASHES_PER_ITEM", 3)
    new = splits.Splits({f"{n:032x}": "train" for n in range(7)}, {"beagle": 7})
    ledger.save_splits(new, after=0)
    contents = ledger.contents()
    assert contents.splits == new and contents.split_items == 3
    ledger.save_splits(splits.Splits({"f" * 32: "test"}, {"beagle": 8}), after=3)
    assert ledger.contents().splits.dealt == {"beagle": 8} and len(ledger.contents().splits.of) == 8


def test_of_two_that_would_deal_splits_at_once_the_second_is_stopped(aws):
    ledger.save_splits(splits.Splits({"0" * 32: "train"}, {"beagle": 1}), after=0)
    with pytest.raises(ledger.LedgerMoved, match="by another"):
        ledger.save_splits(splits.Splits({"0" * 32: "test"}, {"beagle": 1}), after=0)
    assert ledger.contents().splits.of == {"0" * 32: "train"}


def test_what_is_left_out_is_kept_beside_the_snapshot(aws, context):
    label(aws, context, "beagle", range(10))
    label(aws, context, "boxer", [*range(20, 30), 0])
    taken = snapshot.handler({}, context)
    body = aws.s3.get_object(Bucket=aws.artifacts, Key=f"datasets/{taken['hash']}/left_out.json")["Body"]
    told = json.loads(body.read())
    assert told["taken_at"] == taken["takenAt"] and told["classes"] == {}
    (left,) = told["pictures"]
    assert left["reason"] == "the same picture is labelled beagle and boxer"
    assert left["origins"] == [f"s3://{aws.bucket}/labelled/{name}/0.png" for name in ("beagle", "boxer")]


def test_a_snapshot_can_be_repeated_when_all_its_labels_are_gone(aws, context):
    label(aws, context, "beagle", range(10))
    label(aws, context, "boxer", range(20, 30))
    taken = snapshot.handler({}, context)
    for row in aws.labels.scan()["Items"]:
        aws.labels.delete_item(Key={"pk": row["pk"]})
    aws.s3.delete_object(Bucket=aws.artifacts, Key=f"datasets/{taken['hash']}/images.manifest")
    again = snapshot.handler({"snapshot": taken["hash"]}, context)
    assert again == taken
    aws.s3.head_object(Bucket=aws.artifacts, Key=f"datasets/{taken['hash']}/images.manifest")


def test_a_snapshot_that_is_not_whole_is_not_repeated_and_says_why(aws, context):
    label(aws, context, "beagle", range(10))
    label(aws, context, "boxer", range(20, 30))
    with pytest.raises(snapshot.NoSuchSnapshot, match="there is no snapshot 0000"):
        snapshot.handler({"snapshot": "0000"}, context)
    taken = snapshot.handler({}, context)
    key, name = f"datasets/{taken['hash']}/manifest.jsonl", manifest(aws, taken)[0]["sha256"]
    aws.s3.delete_object(Bucket=aws.artifacts, Key=f"images/{name}")
    with pytest.raises(snapshot.NoSuchSnapshot, match="1 of 20 pictures of snapshot .* are no longer kept"):
        snapshot.handler({"snapshot": taken["hash"]}, context)
    lines = aws.s3.get_object(Bucket=aws.artifacts, Key=key)["Body"].read()
    for body, reason in ((lines.replace(b"boxer", b"pug"), "is not what was trained"), (b"[", "cannot be read")):
        aws.s3.put_object(Bucket=aws.artifacts, Key=key, Body=body)
        with pytest.raises(snapshot.NoSuchSnapshot, match=reason):
            snapshot.handler({"snapshot": taken["hash"]}, context)


def test_a_snapshot_of_one_class_says_what_is_missing(aws, context):
    label(aws, context, "beagle", range(10))
    with pytest.raises(snapshot.TooFewPictures, match="two classes or more, 1 can take part"):
        snapshot.handler({}, context)


def test_event_order_is_immaterial_for_labels(aws, context):
    first = put(aws, "labelled/beagle/1.png", picture(1), "01")
    second = put(aws, "labelled/beagle/1.png", picture(2), "02")
    register.handler(events.sqs_batch(second, first), context)
    assert item(aws, "labelled/beagle/1.png")["sequencer"] == ObjectEvent.from_body(second).sequencer
