"""Sending pictures through the inbox again: which, in what order, page by page."""

import json
from datetime import timedelta
from typing import Any

import pytest

from common import clock, predictions
from common.events import ObjectEvent
from replay_images import app as replay
from tests.makers import events

TODAY = clock.now().date().isoformat()
SOON = clock.iso(clock.now() + timedelta(hours=1))
deployment = 0  # each answer is a later model's


def event(aws: Any, name: str) -> ObjectEvent:
    return ObjectEvent.from_body(events.object_created(aws.bucket, f"inbox/{name}", size=10, version=f"v-{name}"))


def classify(aws: Any, name: str, label: str = "beagle", confidence: float = 0.9) -> None:
    global deployment
    deployment += 1
    answer = predictions.Answer(
        event(aws, name), [{"class": label, "probability": confidence}], model_version="1", deployment=deployment,
        dataset_hash="d", width=9, height=9, format="PNG", latency_ms=1.0,
    )  # fmt: skip
    assert predictions.classified([answer]) == [None]


def move(aws: Any, name: str, day: str, hour: int) -> None:
    """Make the current row of a picture one of another day."""
    key = {"image": f"{aws.bucket}/inbox/{name}", "version": "current"}
    row = aws.predictions.get_item(Key=key)["Item"]
    row |= {"updated_at": f"{day}T{hour:02}:00:00.000Z", "status_day": f"{row['status']}#{day}"}
    row |= {"class_day": f"{row['label']}#{day}"} if "label" in row else {}
    aws.predictions.put_item(Item=row)


def run(selection: dict[str, Any], context: Any) -> dict[str, Any]:
    """Call the function as the workflow does, through JSON, until nothing is left; says how often with `calls`."""
    answer: dict[str, Any] = selection
    for calls in range(1, 100):
        answer = json.loads(json.dumps(replay.handler(answer, context)))
        if answer["next"] is None:
            return answer | {"calls": calls}
    raise AssertionError("it goes on for ever")


def sent(aws: Any) -> list[ObjectEvent]:
    received = []
    while got := aws.sqs.receive_message(QueueUrl=aws.queues["inbox"], MaxNumberOfMessages=10).get("Messages"):
        received += [ObjectEvent.from_body(message["Body"]) for message in got]
        for message in got:
            aws.sqs.delete_message(QueueUrl=aws.queues["inbox"], ReceiptHandle=message["ReceiptHandle"])
    assert all(event.replayed and event.version_id == f"v-{name(event)}" for event in received)
    return received


def name(event: ObjectEvent) -> str:
    return event.key.removeprefix("inbox/")


def names(aws: Any) -> list[str]:
    return [name(event) for event in sent(aws)]


def test_what_waits_is_sent_oldest_first_over_days_and_pages(aws, context, monkeypatch):
    monkeypatch.setattr(replay, "PAGE", 2)
    for number in range(5):
        predictions.waiting(event(aws, f"{number}.jpg"))
    for number, (day, hour) in enumerate([("2026-11-20", 3), ("2026-11-20", 1), ("2026-11-20", 2), ("2026-11-17", 9)]):
        move(aws, f"{number}.jpg", day, hour)
    aws.state.put_item(Item={"pk": "inbox", "sk": "first_waiting_day", "day": "2026-11-16"})
    answer = run({"status": "WAITING", "before": SOON}, context)
    assert answer["sent"] == 5 and answer["calls"] >= 3
    assert names(aws) == ["3.jpg", "1.jpg", "2.jpg", "0.jpg", "4.jpg"]


def test_nothing_waits_where_nothing_ever_waited(aws, context):
    assert replay.handler({"status": "WAITING"}, context)["next"] is None


def test_what_the_model_was_unsure_of_comes_least_confident_first(aws, context, monkeypatch):
    monkeypatch.setattr(replay, "PAGE", 1)
    for number, confidence in enumerate([0.5, 0.3, 0.9, 0.4]):
        classify(aws, f"{number}.jpg", confidence=confidence)
    answer = run({"review": True, "before": SOON}, context)
    assert answer["sent"] == 3 and names(aws) == ["1.jpg", "3.jpg", "0.jpg"]


def test_a_class_and_a_status_are_replayed_by_day(aws, context):
    for number, label in enumerate(["beagle", "boxer", "beagle", "beagle"]):
        classify(aws, f"{number}.jpg", label)
        move(aws, f"{number}.jpg", f"2026-11-{18 + number}", 1)
    predictions.failed(event(aws, "failed.jpg"), "trouble")
    move(aws, "failed.jpg", "2026-11-19", 1)
    before = {"before": SOON}
    assert run({"class": "beagle", "from": "2026-11-18", "to": "2026-11-20"} | before, context)["sent"] == 2
    assert names(aws) == ["0.jpg", "2.jpg"]
    assert run({"status": "FAILED", "from": "2026-11-18"} | before, context)["sent"] == 1
    assert names(aws) == ["failed.jpg"]
    assert run({"status": "CLASSIFIED", "from": "2026-11-18"} | before, context)["sent"] == 4
    assert names(aws) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


@pytest.mark.parametrize("selection", [{"status": "CLASSIFIED", "from": TODAY}, {"review": True}])
def test_a_replay_does_not_meet_its_own_answers(aws, context, monkeypatch, selection):
    """A replayed picture is classified while the replay goes on, and its new row is of this day, in the same index."""
    monkeypatch.setattr(replay, "PAGE", 1)
    moments = iter(clock.parse(f"{TODAY}T00:00:{second:02}Z") for second in range(60))
    monkeypatch.setattr(clock, "now", lambda: next(moments))
    classify(aws, "1.jpg", confidence=0.3)
    classify(aws, "2.jpg", confidence=0.4)
    answer = replay.handler(selection, context)
    for picture in ("1.jpg", "2.jpg"):
        classify(aws, picture, confidence=0.5)
    assert run(answer, context)["sent"] <= 2


@pytest.mark.parametrize("selection", [{}, {"status": "FAILED"}, {"class": "a", "status": "FAILED"}, {"class": "a"}])
def test_a_selection_that_is_none_is_refused(aws, context, selection):
    with pytest.raises(replay.BadSelection):
        replay.handler(selection, context)
