"""Pictures whose event was lost are found and enqueued, in a place in the order that does no harm."""

import io
import json
from datetime import UTC, datetime
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classify_images import app as classify
from common import endpoint, inbox, predictions, sequencer, state
from common.events import SEQUENCER_WIDTH, ObjectEvent
from reconcile_inbox import app as reconcile
from tests.makers import events
from tests.makers.coloured import coloured

CHAMPION = {
    "pk": "champion", "sk": "champion", "model_version": "261122000000", "deployment": 1, "endpoint": "houndloop",
    "dataset_hash": "d1", "preprocess": json.dumps(
        {"size": 32, "resize": 37, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    ),
}  # fmt: skip
EARLIER, LATER = "00AA", "00AB"  # sequencers of events


class Context(SimpleNamespace):
    """An invocation with time for so many pages."""

    pages = 1000

    def get_remaining_time_in_millis(self) -> int:
        self.pages -= 1
        return 100_000 if self.pages >= 0 else 0


@pytest.fixture
def time(context: SimpleNamespace) -> Context:
    return Context(**vars(context))


@pytest.fixture(autouse=True)
def stack(aws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = aws.sqs.create_queue(QueueName="reconcile")["QueueUrl"]
    aws.queues["reconcile"] = queue
    monkeypatch.setenv("RECONCILE_QUEUE_URL", queue)
    monkeypatch.setenv("DATA_BUCKET", aws.bucket)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endpoint:
        def invoke_endpoint(self, *, Body: bytes, **_: Any) -> dict[str, Any]:
            classes = {"classes": [{"class": "beagle", "probability": 0.9}]}
            count = len(Body) // (32 * 32 * 3)
            answer = {"model_version": "261122000000", "deployment": 1, "predictions": [classes] * count}
            return {"Body": io.BytesIO(json.dumps(answer).encode())}

    monkeypatch.setattr(endpoint, "runtime", lambda: Endpoint())


def put(aws: Any, name: str, data: bytes = b"picture") -> str:
    """Write a version of a picture; its id."""
    return aws.s3.put_object(Bucket=aws.bucket, Key=f"inbox/{name}", Body=data)["VersionId"]


def heard(aws: Any, name: str, version: str, place: str) -> ObjectEvent:
    return ObjectEvent.from_body(
        events.object_created(aws.bucket, f"inbox/{name}", sequencer=place, size=7, version=version)
    )


def walk(time: Context, **message: Any) -> None:
    reconcile.handler(events.sqs_batch(json.dumps({"min_age_seconds": -60} | message)), time)


def taken(aws: Any, queue: str) -> list[str]:
    """The messages of a queue, which it then has no more."""
    bodies: list[str] = []
    while got := aws.sqs.receive_message(QueueUrl=aws.queues[queue], MaxNumberOfMessages=10).get("Messages"):
        bodies += [message["Body"] for message in got]
        for message in got:
            aws.sqs.delete_message(QueueUrl=aws.queues[queue], ReceiptHandle=message["ReceiptHandle"])
    return bodies


def enqueued(aws: Any) -> dict[str, ObjectEvent]:
    found = [ObjectEvent.from_body(body) for body in taken(aws, "inbox")]
    assert len({event.key for event in found}) == len(found)
    return {event.key.removeprefix("inbox/"): event for event in found}


def test_a_picture_without_a_row_or_with_one_of_an_older_version_is_enqueued_and_no_other(aws, time):
    aws.state.put_item(Item=CHAMPION)
    for status in ("rejected", "failed", "waiting"):
        version = put(aws, status)
        event = heard(aws, status, version, EARLIER)
        predictions.waiting(event) if status == "waiting" else getattr(predictions, status)(event, "why")
    predictions.rejected(heard(aws, "old", put(aws, "old"), EARLIER), "why")
    newest = put(aws, "old")
    unheard = put(aws, "ünheard of +%20'\"🐕.jpg")
    put(aws, "deleted")
    aws.s3.delete_object(Bucket=aws.bucket, Key="inbox/deleted")
    aws.s3.put_object(Bucket=aws.bucket, Key="inbox/folder/", Body=b"")
    aws.s3.put_object(Bucket=aws.bucket, Key="labelled/beagle/1.jpg", Body=b"x")
    walk(time)
    found = enqueued(aws)
    assert {name: event.version_id for name, event in found.items() if name != "waiting"} == {
        "old": newest,
        "ünheard of +%20'\"🐕.jpg": unheard,
    }
    assert found["waiting"].sequencer == EARLIER.ljust(SEQUENCER_WIDTH, "0"), "a model is live; it waits for nothing"
    progress = state.get("reconcile", "walk")
    assert progress and (progress["seen"], progress["enqueued"]) == (7, 3) and progress["ended_at"]


def test_what_waits_for_a_model_goes_on_waiting(aws, time):
    predictions.waiting(heard(aws, "1.jpg", put(aws, "1.jpg"), EARLIER))
    walk(time)
    assert enqueued(aws) == {}


def test_young_pictures_are_left_to_their_events(aws, time):
    put(aws, "1.jpg")
    reconcile.handler(events.sqs_batch("{}"), time)
    assert enqueued(aws) == {}


def test_the_row_of_a_deleted_picture_speaks_of_its_last_version(aws, served, time, monkeypatch):
    monkeypatch.setattr(reconcile, "PAGE", 2)  # pages end among the markers
    aws.state.put_item(Item=CHAMPION)
    last = {}
    for number, name in enumerate(("answered", "behind", "waiting", "without a row")):
        versions = [put(aws, name, data) for data in coloured("red", 2, seed=number)]
        last[name] = versions[1]
        row_of = {"answered": versions[1], "behind": versions[0], "waiting": versions[1]}.get(name)
        if row_of:
            event = heard(aws, name, row_of, EARLIER)
            predictions.waiting(event) if name == "waiting" else predictions.rejected(event, "why")
        for _ in range(3):
            aws.s3.delete_object(Bucket=aws.bucket, Key=f"inbox/{name}")
    walk(time)
    found = enqueued(aws)
    assert {name: event.version_id for name, event in found.items()} == {n: last[n] for n in ("behind", "waiting")}
    deliver(aws, time, *(event.to_body() for event in found.values()))
    assert all(current(aws, name)["version_id"] == last[name] for name in ("answered", "behind", "waiting"))
    walk(time)
    assert enqueued(aws) == {}


def test_what_is_answered_while_the_walk_looks_at_it_is_not_set_back(aws, time, monkeypatch):
    predictions.rejected(heard(aws, "1.jpg", put(aws, "1.jpg"), EARLIER), "why")
    read = predictions.current_rows

    def read_late(asked: list[ObjectEvent]) -> Any:
        predictions.rejected(heard(aws, "1.jpg", put(aws, "1.jpg"), LATER), "why")
        return read(asked)

    monkeypatch.setattr(predictions, "current_rows", read_late)
    walk(time)
    assert enqueued(aws) == {}


def test_a_walk_goes_on_where_it_stopped_by_a_message_of_its_own(aws, time, monkeypatch):
    monkeypatch.setattr(reconcile, "PAGE", 3)
    for number in range(10):
        for _ in range(1 + number % 3):  # pages end in the middle of a key's versions
            put(aws, f"{number}.jpg")
    for _ in range(20):
        time.pages = 1
        message = taken(aws, "reconcile")
        reconcile.handler(events.sqs_batch(message[0] if message else '{"min_age_seconds": -60}'), time)
        if (state.get("reconcile", "walk") or {}).get("ended_at"):
            break
    assert set(enqueued(aws)) == {f"{n}.jpg" for n in range(10)}
    assert taken(aws, "reconcile") == [] and state.get("reconcile", "walk")["seen"] == 10


def test_a_walk_whose_first_try_fails_is_not_given_up(aws, time, monkeypatch):
    """SQS delivers the same message again."""
    put(aws, "lost.jpg")
    message = events.sqs_batch(json.dumps({"min_age_seconds": -60}))
    with monkeypatch.context() as patch:
        patch.setattr(reconcile, "page", lambda marker: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reconcile.handler(message, time)
    reconcile.handler(message, time)
    assert set(enqueued(aws)) == {"lost.jpg"}


def test_a_long_backlog_makes_the_walk_wait_and_later_go_on(aws, time, monkeypatch):
    monkeypatch.setattr(reconcile, "PAGE", 2)
    monkeypatch.setattr(inbox, "MAX_BACKLOG", 3)
    monkeypatch.setattr(reconcile, "WAIT_SECONDS", 0)
    for number in range(7):
        put(aws, f"{number}.jpg")
    walk(time)
    assert set(enqueued(aws)) == {"0.jpg", "1.jpg", "2.jpg", "3.jpg"}
    for number in range(3):
        aws.sqs.send_message(QueueUrl=aws.queues["inbox"], MessageBody=f"fresh {number}", DelaySeconds=number * 60)
    (message,) = taken(aws, "reconcile")
    reconcile.handler(events.sqs_batch(message), time)
    assert taken(aws, "inbox") == ["fresh 0"], "those put back count as backlog too"
    aws.sqs.purge_queue(QueueUrl=aws.queues["inbox"])
    (message,) = taken(aws, "reconcile")
    reconcile.handler(events.sqs_batch(message), time)
    assert set(enqueued(aws)) == {"4.jpg", "5.jpg", "6.jpg"}


def test_there_is_one_walk_at_a_time_until_it_is_not_heard_of_any_more(aws, time, monkeypatch):
    put(aws, "1.jpg")
    assert state.begin_walk("first", "schedule")
    walk(time)
    assert enqueued(aws) == {}
    monkeypatch.setattr(state, "WALK_IS_STALE", -state.WALK_IS_STALE)
    walk(time)
    assert set(enqueued(aws)) == {"1.jpg"}
    put(aws, "2.jpg")
    walk(time, walk="first")  # a late message of the one that was replaced
    assert taken(aws, "reconcile") == [] and state.get("reconcile", "walk")["enqueued"] == 1


HEX = st.text("0123456789ABCDEF", min_size=1, max_size=SEQUENCER_WIDTH - sequencer.TAIL)
MOMENTS = st.datetimes(datetime(2006, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))


@given(HEX, HEX, MOMENTS)
def test_a_made_sequencer_comes_after_the_row_and_before_any_newer_event(one: str, other: str, written: datetime):
    older, newer = sorted(place.ljust(SEQUENCER_WIDTH, "0") for place in (one, other))
    made = sequencer.after(older, written)
    assert older < made and len(made) == SEQUENCER_WIDTH
    assert made < newer or older == newer
    assert sequencer.is_made(made) and not sequencer.is_made(older)


@given(HEX, MOMENTS, MOMENTS)
def test_made_sequencers_come_in_the_order_of_writing(place: str, one: datetime, other: datetime):
    place = place.ljust(SEQUENCER_WIDTH, "0")
    earlier, later = sorted((one, other))
    assert sequencer.after(place, earlier) <= sequencer.after(place, later)
    again = sequencer.after(sequencer.after(place, later), earlier)  # its clock was behind, or within the same second
    assert sequencer.after(place, later) < again


def deliver(aws: Any, context: Any, *bodies: str) -> None:
    for body in bodies:
        assert classify.handler(events.sqs_batch(body), context) == {"batchItemFailures": []}


def current(aws: Any, name: str) -> dict[str, Any]:
    return aws.predictions.get_item(Key={"image": f"{aws.bucket}/inbox/{name}", "version": "current"})["Item"]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_late_event_and_the_reconciliation_may_come_in_any_order(aws, served, time, order):
    """Version 1 has its row. The events of 2 and 3 are late, and reconciliation found 3 meanwhile."""
    aws.state.put_item(Item=CHAMPION)
    versions = [put(aws, "1.jpg", data) for data in coloured("red", 3, seed=1)]
    deliver(aws, time, heard(aws, "1.jpg", versions[0], "00AA").to_body())
    walk(time)
    found = enqueued(aws)["1.jpg"]
    assert found.version_id == versions[2]
    bodies = [
        found.to_body(),
        heard(aws, "1.jpg", versions[1], "00AB").to_body(),
        heard(aws, "1.jpg", versions[2], "00AC").to_body(),
    ]
    deliver(aws, time, *(bodies[n] for n in order))
    assert current(aws, "1.jpg")["version_id"] == versions[2]


@pytest.mark.parametrize("order", list(permutations(range(2))))
@pytest.mark.parametrize("first_row", [True, False])
def test_an_older_version_whose_event_is_late_never_hides_the_one_that_was_found(aws, served, time, order, first_row):
    """The event of version 3 is lost for good, that of 2 is late; version 1 has a row, or none."""
    aws.state.put_item(Item=CHAMPION)
    versions = [put(aws, "1.jpg", data) for data in coloured("red", 3, seed=1)]
    if first_row:
        deliver(aws, time, heard(aws, "1.jpg", versions[0], "00AA").to_body())
    walk(time)
    bodies = [enqueued(aws)["1.jpg"].to_body(), heard(aws, "1.jpg", versions[1], "00AB").to_body()]
    deliver(aws, time, *(bodies[n] for n in order))
    if order == (1, 0):  # the late event made its row first, so the message that was found is the older one now
        walk(time)
        deliver(aws, time, *(event.to_body() for event in enqueued(aws).values()))
    assert current(aws, "1.jpg")["version_id"] == versions[2]
    walk(time)
    assert enqueued(aws) == {}


def test_a_newer_picture_replaces_the_one_that_was_found(aws, served, time):
    aws.state.put_item(Item=CHAMPION)
    first, second = [put(aws, "1.jpg", data) for data in coloured("red", 2, seed=1)]
    walk(time)
    deliver(aws, time, enqueued(aws)["1.jpg"].to_body())
    assert current(aws, "1.jpg")["version_id"] == second
    third = put(aws, "1.jpg", next(coloured("green", 1, seed=1)))
    deliver(aws, time, heard(aws, "1.jpg", third, "00AD").to_body())
    assert current(aws, "1.jpg")["version_id"] == third
