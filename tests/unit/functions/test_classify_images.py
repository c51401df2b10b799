"""From a batch of inbox messages to rows, with an endpoint that does as it is told."""

import io
import json
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from moto.dynamodb.models import DynamoDBBackend
from PIL import Image

from classify_images import app, batch, pictures
from common import endpoint
from tests.makers import events

CHAMPION = {
    "pk": "champion", "sk": "champion", "model_version": "261122000000", "deployment": 1, "endpoint": "houndloop",
    "dataset_hash": "d1", "preprocess": json.dumps(
        {"size": 32, "resize": 37, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    ),
}  # fmt: skip


def jpeg(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(out, "JPEG")
    return out.getvalue()


class Endpoint:
    """Answers about each crop; `error` makes it fail, `deployment` is who answers."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.deployment = 1
        self.confidence = 0.9
        self.requests: list[int] = []

    def invoke_endpoint(self, *, Body: bytes, **_: Any) -> dict[str, Any]:
        if self.error:
            raise self.error
        count = len(Body) // (32 * 32 * 3)
        self.requests.append(count)
        classes = [
            {"class": "beagle", "probability": self.confidence},
            {"class": "boxer", "probability": 1 - self.confidence},
        ]
        answer = {
            "model_version": f"26112200000{self.deployment - 1}",
            "deployment": self.deployment,
            "predictions": [{"classes": classes}] * count,
        }
        return {"Body": io.BytesIO(json.dumps(answer).encode())}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    fake = Endpoint()
    monkeypatch.setattr(app.EndpointHealth, "in_trouble", False)
    monkeypatch.setattr(endpoint, "runtime", lambda: fake)
    return fake


def drop(aws: Any, name: str, data: bytes, sequencer: str = "01") -> str:
    version = aws.s3.put_object(Bucket=aws.bucket, Key=f"inbox/{name}", Body=data)["VersionId"]
    return events.object_created(aws.bucket, f"inbox/{name}", sequencer=sequencer, size=len(data), version=version)


def current(aws: Any, name: str) -> dict[str, Any] | None:
    key = {"image": f"{aws.bucket}/inbox/{name}", "version": "current"}
    return aws.predictions.get_item(Key=key).get("Item")


def history(aws: Any, name: str) -> list[str]:
    from boto3.dynamodb.conditions import Key

    items = aws.predictions.query(KeyConditionExpression=Key("image").eq(f"{aws.bucket}/inbox/{name}"))["Items"]
    return [item["version"] for item in items if item["version"] != "current"]


def queued(aws: Any) -> list[dict[str, Any]]:
    got = aws.sqs.receive_message(QueueUrl=aws.queues["inbox"], MaxNumberOfMessages=10).get("Messages", [])
    return [json.loads(message["Body"]) for message in got]


def test_a_batch_is_one_request_and_each_picture_gets_its_row(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    bodies = [drop(aws, f"{i}.jpg", jpeg()) for i in range(10)]
    assert app.handler(events.sqs_batch(*bodies), context) == {"batchItemFailures": []}
    assert served.requests == [10]
    row = current(aws, "3.jpg")
    assert (row["status"], row["label"], float(row["confidence"])) == ("CLASSIFIED", "beagle", 0.9)
    assert row["class_day"].startswith("beagle#20") and row["dataset_hash"] == "d1" and "review" not in row
    assert (row["width"], row["height"], row["format"]) == (64, 48, "JPEG")


def test_bad_files_are_rejected_with_the_reason_and_the_good_ones_classified(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    bodies = [
        drop(aws, "notes.txt", b"hello"),
        drop(aws, "cut.jpg", jpeg()[:300]),
        drop(aws, "empty.jpg", b""),
        drop(aws, "a.jpg", jpeg()),
    ]
    assert app.handler(events.sqs_batch(*bodies), context) == {"batchItemFailures": []}
    assert current(aws, "a.jpg")["status"] == "CLASSIFIED"
    for name, reason in {"notes.txt": "not an image", "cut.jpg": "truncated", "empty.jpg": "empty"}.items():
        row = current(aws, name)
        assert row["status"] == "REJECTED" and reason in row["reason"], row
        tags = aws.s3.get_object_tagging(Bucket=aws.bucket, Key=f"inbox/{name}")["TagSet"]
        assert tags == [{"Key": "houndloop", "Value": "rejected"}]
        note = json.loads(aws.s3.get_object(Bucket=aws.bucket, Key=f"quarantine/{name}.json")["Body"].read())
        assert reason in note["reason"] and note["key"] == f"inbox/{name}"


def test_a_file_over_the_limit_is_rejected_without_being_fetched(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    body = drop(aws, "big.jpg", jpeg())
    monkeypatch.setenv("MAX_IMAGE_BYTES", "10")
    monkeypatch.setattr(pictures, "fetch", lambda event, until: pytest.fail("fetched"))
    app.handler(events.sqs_batch(body), context)
    assert "larger than" in current(aws, "big.jpg")["reason"]


def test_a_file_that_is_too_large_to_copy_is_rejected_where_it_lies(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    version = aws.s3.put_object(Bucket=aws.bucket, Key="inbox/huge.jpg", Body=b"x")["VersionId"]
    body = events.object_created(aws.bucket, "inbox/huge.jpg", size=6 * 1024**3, version=version)
    assert app.handler(events.sqs_batch(body), context) == {"batchItemFailures": []}
    assert current(aws, "huge.jpg")["status"] == "REJECTED"
    kept = aws.s3.list_objects_v2(Bucket=aws.bucket, Prefix="quarantine/")["Contents"]
    assert [thing["Key"] for thing in kept] == ["quarantine/huge.jpg.json"]


def test_without_a_model_pictures_wait_and_what_is_none_is_rejected(aws, served, context):
    app.handler(events.sqs_batch(drop(aws, "a.jpg", jpeg()), drop(aws, "notes.txt", b"hello")), context)
    assert current(aws, "a.jpg")["status"] == "WAITING"
    assert current(aws, "notes.txt")["status"] == "REJECTED"
    assert aws.state.get_item(Key={"pk": "inbox", "sk": "first_waiting_day"})["Item"]["day"][:2] == "20"


def test_a_picture_that_waits_while_a_model_goes_live_is_sent_again(aws, served, context, monkeypatch):
    """Between the look at the champion and the row, the champion came and its replay went by."""
    looks = iter([None, CHAMPION])
    monkeypatch.setattr(app.state, "champion", lambda: next(looks))
    body = drop(aws, "a.jpg", jpeg())
    assert app.handler(events.sqs_batch(body), context) == {"batchItemFailures": []}
    assert current(aws, "a.jpg")["status"] == "WAITING"
    [again] = queued(aws)
    assert again["detail"]["object"]["key"] == "inbox/a.jpg"


def test_a_repeated_event_asks_nothing_and_changes_nothing(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    body = drop(aws, "a.jpg", jpeg())
    app.handler(events.sqs_batch(body), context)
    before = current(aws, "a.jpg")
    app.handler(events.sqs_batch(body), context)
    assert current(aws, "a.jpg") == before and served.requests == [1]


def test_an_older_event_that_comes_late_changes_nothing(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    old = drop(aws, "a.jpg", jpeg(), sequencer="01")
    new = drop(aws, "a.jpg", jpeg((0, 0, 200)), sequencer="0101")
    app.handler(events.sqs_batch(new), context)
    app.handler(events.sqs_batch(old), context)
    assert current(aws, "a.jpg")["sequencer"].startswith("0101") and len(history(aws, "a.jpg")) == 1


def test_two_versions_in_one_batch_leave_the_newer(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    new = drop(aws, "a.jpg", jpeg(), sequencer="02")
    old = drop(aws, "a.jpg", jpeg(), sequencer="01")
    app.handler(events.sqs_batch(new, old), context)
    assert current(aws, "a.jpg")["sequencer"].startswith("02")


def test_a_replay_answers_again_and_keeps_the_former_answer(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    body = drop(aws, "a.jpg", jpeg())
    app.handler(events.sqs_batch(body), context)
    served.deployment = 2
    app.handler(events.sqs_batch(app.ObjectEvent.from_body(body).to_body(replayed=True)), context)
    assert current(aws, "a.jpg")["deployment"] == 2 and len(history(aws, "a.jpg")) == 2


def test_an_earlier_deployment_never_overwrites_a_later_ones_answer(aws, served, context):
    """Not even to what is asked again: the last instances of the earlier one answer while they go."""
    aws.state.put_item(Item=CHAMPION | {"deployment": 2})
    body = drop(aws, "a.jpg", jpeg())
    served.deployment = 2
    app.handler(events.sqs_batch(body), context)
    served.deployment = 1
    app.handler(events.sqs_batch(app.ObjectEvent.from_body(body).to_body(replayed=True)), context)
    assert current(aws, "a.jpg")["deployment"] == 2


def test_low_confidence_awaits_review(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    served.confidence = 0.51
    app.handler(events.sqs_batch(drop(aws, "a.jpg", jpeg())), context)
    assert current(aws, "a.jpg")["review"] == "review"


def test_not_yet_and_not_this_time_never_hide_an_answer(aws, served, context):
    """Another function, which has the same event, looked at the row before the answer came, and writes after it."""
    aws.state.put_item(Item=CHAMPION)
    bodies = [drop(aws, "a.jpg", jpeg()), drop(aws, "notes.txt", b"hello")]
    app.handler(events.sqs_batch(*bodies), context)
    for name, body in zip(("a.jpg", "notes.txt"), bodies, strict=True):
        before, event = current(aws, name), app.ObjectEvent.from_body(body)
        assert not app.predictions.waiting(event) and not app.predictions.failed(event, "why")
        assert current(aws, name) == before


def test_where_history_was_written_and_the_row_was_not_the_next_try_writes_it(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    batch_of_one = events.sqs_batch(drop(aws, "a.jpg", jpeg()))
    insert = app.predictions._insert

    def throttled(rows: list[Any], otherwise: Any) -> list[Any]:
        if otherwise is not app.predictions._kept:
            return [app.predictions.WriteFailed("throttled") for _ in rows]
        return insert(rows, otherwise)

    with monkeypatch.context() as patch:
        patch.setattr(app.predictions, "_insert", throttled)
        answer = app.handler(batch_of_one, context)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "message-0"}]} and current(aws, "a.jpg") is None
    assert app.handler(batch_of_one, context) == {"batchItemFailures": []}
    assert current(aws, "a.jpg")["status"] == "CLASSIFIED" and len(history(aws, "a.jpg")) == 1


def test_what_was_reviewed_stays_so_until_another_model_answers(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    served.confidence = 0.51
    body = drop(aws, "a.jpg", jpeg())
    app.handler(events.sqs_batch(body), context)
    key = {"image": f"{aws.bucket}/inbox/a.jpg", "version": "current"}
    aws.predictions.update_item(Key=key, UpdateExpression="REMOVE review")
    again = events.sqs_batch(app.ObjectEvent.from_body(body).to_body(replayed=True))
    app.handler(again, context)
    assert served.requests == [1, 1] and "review" not in current(aws, "a.jpg")
    served.deployment = 2
    app.handler(again, context)
    assert current(aws, "a.jpg")["review"] == "review"


def test_the_answer_of_a_deployment_that_was_rolled_back_goes_when_the_champion_is_asked_again(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    body = drop(aws, "a.jpg", jpeg())
    served.deployment = 2  # the canary's
    app.handler(events.sqs_batch(body), context)
    served.deployment = int(CHAMPION["deployment"])
    app.handler(events.sqs_batch(body), context)
    assert current(aws, "a.jpg")["deployment"] == 2, "a repeated event is no question"
    app.handler(events.sqs_batch(app.ObjectEvent.from_body(body).to_body(replayed=True)), context)
    assert current(aws, "a.jpg")["deployment"] == CHAMPION["deployment"] and len(history(aws, "a.jpg")) == 2


@pytest.mark.parametrize(
    "error",
    [
        ClientError({"Error": {"Code": "ModelError", "Message": "busy"}, "OriginalStatusCode": 429}, "InvokeEndpoint"),
        ClientError({"Error": {"Code": "ThrottlingException", "Message": "slow down"}}, "InvokeEndpoint"),
        ClientError({"Error": {"Code": "ValidationError", "Message": "Endpoint not found"}}, "InvokeEndpoint"),
    ],
)
def test_trouble_of_the_endpoint_costs_no_message_its_tries(aws, served, context, error):
    aws.state.put_item(Item=CHAMPION)
    served.error = error
    bodies = [drop(aws, f"{i}.jpg", jpeg()) for i in range(2)]
    assert app.handler(events.sqs_batch(*bodies, receives=1), context) == {"batchItemFailures": []}
    attributes = aws.sqs.get_queue_attributes(QueueUrl=aws.queues["inbox"], AttributeNames=["All"])["Attributes"]
    assert attributes["ApproximateNumberOfMessagesDelayed"] == "2"
    assert current(aws, "0.jpg") is None


def test_one_slow_or_failing_download_fails_its_own_message_only(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    bodies = [drop(aws, f"{i}.jpg", jpeg()) for i in range(3)]
    fetch = pictures.fetch

    def failing(event: Any, until: float) -> bytes | None:
        if event.key.endswith("1.jpg"):
            raise ClientError({"Error": {"Code": "SlowDown", "Message": "later"}}, "GetObject")
        return fetch(event, until)

    monkeypatch.setattr(pictures, "fetch", failing)
    answer = app.handler(events.sqs_batch(*bodies), context)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "message-1"}]}
    assert current(aws, "0.jpg")["status"] == current(aws, "2.jpg")["status"] == "CLASSIFIED"
    assert current(aws, "1.jpg") is None


def test_the_last_try_leaves_a_failed_row_with_the_error(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    body = drop(aws, "a.jpg", jpeg())
    monkeypatch.setattr(pictures, "fetch", lambda event, until: 1 / 0)
    answer = app.handler(events.sqs_batch(body, receives=5), context)
    assert answer["batchItemFailures"] and "ZeroDivisionError" in current(aws, "a.jpg")["reason"]


def test_a_last_try_that_kills_the_function_is_failed_already(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    body = drop(aws, "a.jpg", jpeg())

    def die(event: Any, until: float) -> bytes:
        row = current(aws, "a.jpg")
        assert row["status"] == "FAILED" and "did not finish" in row["reason"]
        raise SystemExit

    monkeypatch.setattr(pictures, "fetch", die)
    with pytest.raises(SystemExit):
        app.handler(events.sqs_batch(body, receives=5), context)


def test_a_last_try_about_a_deleted_picture_says_so(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    gone = events.object_created(aws.bucket, "inbox/gone.jpg", size=5)
    assert app.handler(events.sqs_batch(gone, receives=5), context) == {"batchItemFailures": []}
    assert current(aws, "gone.jpg")["reason"] == "it was deleted before it was read"


def test_a_deleted_object_and_a_folder_marker_leave_no_row(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    gone = events.object_created(aws.bucket, "inbox/gone.jpg", size=5)
    marker = events.object_created(aws.bucket, "inbox/folder/", size=0)
    assert app.handler(events.sqs_batch(gone, marker), context) == {"batchItemFailures": []}
    assert aws.predictions.scan()["Items"] == []


def test_an_unreadable_message_goes_to_the_dead_letters_not_to_nowhere(aws, served, context):
    answer = app.handler(events.sqs_batch("hello", drop(aws, "a.jpg", jpeg())), context)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "message-0"}]}
    assert current(aws, "a.jpg")["status"] == "WAITING"


def test_requests_stay_under_the_payload_limit():
    crops = [b"x" * (224 * 224 * 3)] * 60
    assert [len(chunk) for chunk in endpoint.chunks(crops)] == [26, 26, 8]


def test_the_longest_key_has_a_place_in_quarantine():
    key = "inbox/" + "ü" * 509
    assert len(f"{app.quarantine_key(key)}.json".encode()) <= 1024


def decode_with(monkeypatch: Any, program: str) -> None:
    """Let the process that decodes run `program`; `decode()` in it is what it runs otherwise."""
    start = subprocess.Popen
    isolated = pictures.isolated.__name__
    decode = (
        f"import os, runpy, time, preprocessing\ndecode = lambda: runpy.run_module({isolated!r}, run_name='__main__')"
    )

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", isolated]
        return start([command[0], "-c", f"{decode}\n{program}", *command[3:]], **options)

    monkeypatch.setattr(pictures.subprocess, "Popen", popen)


def test_a_second_try_survives_a_picture_that_kills_its_decoder(aws, served, context, monkeypatch):
    """The poison is decoded elsewhere, and its neighbours in the batch get their rows."""
    aws.state.put_item(Item=CHAMPION)
    poison = jpeg((1, 2, 3))
    bodies = [drop(aws, "poison.jpg", poison), drop(aws, "a.jpg", jpeg()), drop(aws, "notes.txt", b"hello")]
    crash = f"lambda data, *a, **k: os.kill(os.getpid(), 11) if data == {poison!r} else prepare(data, *a, **k)"
    decode_with(monkeypatch, f"prepare = preprocessing.prepare\npreprocessing.prepare = {crash}\ndecode()")
    answer = app.handler(events.sqs_batch(*bodies, receives=2), context)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "message-0"}]} and current(aws, "poison.jpg") is None
    assert current(aws, "a.jpg")["status"] == "CLASSIFIED" and current(aws, "notes.txt")["status"] == "REJECTED"
    app.handler(events.sqs_batch(bodies[0], receives=5), context)
    row = current(aws, "poison.jpg")
    assert (row["status"], row["reason"]) == ("FAILED", "it crashed the decoder (signal 11, SIGSEGV)")


def flat_png(width: int, height: int) -> bytes:
    """One colour: few bytes, many pixels."""
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


def test_a_picture_that_needs_more_memory_than_there_is_fails_and_says_so(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    body = drop(aws, "large.png", flat_png(8000, 6000))
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "356")  # 75 MB of them for decoding
    pictures.memory.cache_clear()
    answer = app.handler(events.sqs_batch(body, drop(aws, "a.jpg", jpeg()), receives=5), context)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "message-0"}]}
    assert current(aws, "large.png")["reason"] == "its decoding needed more than 0.1 GB"
    assert current(aws, "large.png")["status"] == "FAILED" and current(aws, "a.jpg")["status"] == "CLASSIFIED"


def test_a_picture_whose_decoding_takes_too_long_fails_and_says_so(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    monkeypatch.setenv("DECODE_SECONDS", "1")
    decode_with(monkeypatch, "time.sleep(60)")
    app.handler(events.sqs_batch(drop(aws, "slow.jpg", jpeg()), receives=5), context)
    assert current(aws, "slow.jpg")["reason"] == "its decoding took longer than 1 s"


def test_large_pictures_are_not_decoded_at_once(monkeypatch):
    budget, most, now = pictures.Budget(100), [0], [0]
    lock = threading.Lock()

    def decode(count: int) -> None:
        with budget.take(count, time.monotonic() + 30):
            with lock:
                now[0] += min(count, 100)
                most[0] = max(most[0], now[0])
            time.sleep(0.01)
            with lock:
                now[0] -= min(count, 100)

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(decode, [40, 70, 30, 500, 60, 10, 90, 100, 20, 50]))
    assert 0 < most[0] <= 100
    with budget.take(60, 0), pytest.raises(app.pictures.OutOfTime), budget.take(50, time.monotonic() + 0.01):
        pass


def test_what_is_not_done_in_time_fails_alone(aws, served, context, monkeypatch):
    """Rows are written for the others, although one download does not end before the invocation does."""
    aws.state.put_item(Item=CHAMPION)
    bodies = [drop(aws, f"{i}.jpg", jpeg()) for i in range(3)]
    context.get_remaining_time_in_millis = lambda: 32_000  # two seconds to load, and what is kept for the rest
    fetch, go_on = pictures.fetch, threading.Event()

    def stuck(event: Any, until: float) -> bytes | None:
        if event.key.endswith("1.jpg"):
            go_on.wait(30)
        return fetch(event, until)

    monkeypatch.setattr(pictures, "fetch", stuck)
    answer = app.handler(events.sqs_batch(*bodies), context)
    go_on.set()
    assert answer == {"batchItemFailures": [{"itemIdentifier": "message-1"}]}
    assert current(aws, "0.jpg")["status"] == current(aws, "2.jpg")["status"] == "CLASSIFIED"


def test_an_endpoint_that_does_not_answer_in_time_costs_no_tries(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    context.get_remaining_time_in_millis = lambda: int((batch.WRITE_SECONDS + 0.5) * 1000)
    monkeypatch.setattr(batch, "ANSWER_SECONDS", 0)
    monkeypatch.setattr(app, "ANSWER_SECONDS", 0)
    go_on = threading.Event()
    monkeypatch.setattr(endpoint, "classify", lambda name, crops: go_on.wait(30))
    assert app.handler(events.sqs_batch(drop(aws, "a.jpg", jpeg())), context) == {"batchItemFailures": []}
    go_on.set()
    assert delayed(aws) == 1


def delayed(aws: Any) -> int:
    attributes = aws.sqs.get_queue_attributes(QueueUrl=aws.queues["inbox"], AttributeNames=["All"])["Attributes"]
    return int(attributes["ApproximateNumberOfMessagesDelayed"])


def test_six_hours_without_the_endpoint_cost_no_message_its_tries(aws, served, context, monkeypatch):
    """The times of SQS are added up instead of waited for; each message comes back as a new one, on its first try."""
    aws.state.put_item(Item=CHAMPION)
    served.error = ClientError(
        {"Error": {"Code": "ValidationError", "Message": "Endpoint not found"}}, "InvokeEndpoint"
    )
    sent: list[dict[str, Any]] = []
    fetched: list[str] = []
    fetch = pictures.fetch
    monkeypatch.setattr(pictures, "fetch", lambda event, until: fetched.append(event.key) or fetch(event, until))
    sqs = SimpleNamespace(send_message_batch=lambda QueueUrl, Entries: sent.extend(Entries) or {})
    client = app.aws.client
    monkeypatch.setattr(app.aws, "client", lambda service: sqs if service == "sqs" else client(service))
    bodies = [drop(aws, f"{i}.jpg", jpeg()) for i in range(4)]
    clock, rounds = 0.0, 0
    while clock < 6 * 3600:
        assert app.handler(events.sqs_batch(*bodies), context) == {"batchItemFailures": []}
        assert len(sent) == 4
        bodies = [entry["MessageBody"] for entry in sent]
        clock, rounds = clock + min(entry["DelaySeconds"] for entry in sent), rounds + 1
        sent.clear()
    assert rounds < 80 and len(fetched) == 4 + rounds - 1  # in trouble, one picture asks for all
    served.error = None
    assert app.handler(events.sqs_batch(*bodies), context) == {"batchItemFailures": []}
    assert {current(aws, f"{i}.jpg")["status"] for i in range(4)} == {"CLASSIFIED"}


def test_a_last_try_that_only_the_endpoint_spoilt_has_not_failed(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    served.error = ClientError({"Error": {"Code": "ThrottlingException", "Message": "slow down"}}, "InvokeEndpoint")
    body = drop(aws, "a.jpg", jpeg())
    assert app.handler(events.sqs_batch(body, receives=5), context) == {"batchItemFailures": []}
    row = current(aws, "a.jpg")
    assert row["status"] == "WAITING" and "slow down" in row["reason"] and delayed(aws) == 1


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"model_version": "m", "deployment": 1, "predictions": [{"classes": []}]},
        {"model_version": "m", "deployment": None, "predictions": [{"classes": [{"class": "x", "probability": 1}]}]},
        {"model_version": "m", "deployment": 1, "predictions": []},
    ],
)
def test_an_answer_that_is_none_is_trouble_of_the_endpoint(aws, served, context, answer):
    aws.state.put_item(Item=CHAMPION)
    served.invoke_endpoint = lambda **_: {"Body": io.BytesIO(json.dumps(answer).encode())}
    assert app.handler(events.sqs_batch(drop(aws, "a.jpg", jpeg())), context) == {"batchItemFailures": []}
    assert delayed(aws) == 1


def test_a_failed_message_is_visible_again_after_seconds(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    monkeypatch.setattr(pictures, "fetch", lambda event, until: 1 / 0)
    aws.sqs.set_queue_attributes(QueueUrl=aws.queues["inbox"], Attributes={"VisibilityTimeout": "360"})
    aws.sqs.send_message(QueueUrl=aws.queues["inbox"], MessageBody=drop(aws, "a.jpg", jpeg()))
    got = aws.sqs.receive_message(QueueUrl=aws.queues["inbox"])["Messages"][0]
    record = events.sqs_batch(got["Body"], receives=5)["Records"][0] | {"receiptHandle": got["ReceiptHandle"]}
    assert app.handler({"Records": [record]}, context)["batchItemFailures"]
    assert aws.sqs.receive_message(QueueUrl=aws.queues["inbox"])["Messages"], (
        "hidden, though it goes to the dead letters"
    )


def test_each_try_waits_longer_than_the_one_before(aws):
    assert [batch.retry_seconds(5) for _ in range(3)] == [0, 0, 0]
    for receives, most in enumerate((15, 60, 240, 900), start=1):
        found = {batch.retry_seconds(receives) for _ in range(50)}
        assert most / 2 - 1 <= min(found) and max(found) <= most and len(found) > 3


def test_a_table_that_fails_fails_its_messages_and_not_the_function(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    error = ClientError(
        {"Error": {"Code": "ProvisionedThroughputExceededException", "Message": "slow"}}, "BatchGetItem"
    )
    bodies = [drop(aws, f"{i}.jpg", jpeg()) for i in range(2)]

    def throttled(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(app.predictions, "current_rows", throttled)
    monkeypatch.setattr(app.predictions, "failed", throttled)
    answer = app.handler(events.sqs_batch(*bodies, receives=5), context)
    assert [failure["itemIdentifier"] for failure in answer["batchItemFailures"]] == ["message-0", "message-1"]


def test_one_write_that_is_refused_fails_its_own_message_only(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    bodies = [drop(aws, f"{i}.jpg", jpeg()) for i in range(3)]
    insert = DynamoDBBackend.batch_execute_statement

    def throttling(self: Any, statements: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = insert(self, statements)
        throttled = {"Error": {"Code": "ThrottlingError", "Message": "slow down"}}
        return [throttled if "1.jpg" in str(s["Parameters"]) else a for s, a in zip(statements, answers, strict=True)]

    monkeypatch.setattr(DynamoDBBackend, "batch_execute_statement", throttling)
    answer = app.handler(events.sqs_batch(*bodies), context)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "message-1"}]}
    assert current(aws, "0.jpg")["status"] == current(aws, "2.jpg")["status"] == "CLASSIFIED"


def test_rejecting_keeps_the_tags_that_the_object_has(aws, served, context):
    body = drop(aws, "notes.txt", b"hello")
    aws.s3.put_object_tagging(
        Bucket=aws.bucket, Key="inbox/notes.txt", Tagging={"TagSet": [{"Key": "owner", "Value": "ada"}]}
    )
    app.handler(events.sqs_batch(body), context)
    tags = aws.s3.get_object_tagging(Bucket=aws.bucket, Key="inbox/notes.txt")["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"owner": "ada", "houndloop": "rejected"}


def test_a_name_that_promises_another_format_is_noted(aws, served, context):
    aws.state.put_item(Item=CHAMPION)
    app.handler(events.sqs_batch(drop(aws, "a.png", jpeg()), drop(aws, "b.jpg", jpeg())), context)
    assert "named .png" in current(aws, "a.png")["note"] and "note" not in current(aws, "b.jpg")


def test_where_the_order_is_not_certain_s3_says_which_version_is_the_newest(aws, served, context):
    """A lost event's version was found by listing; an event that was late, not lost, is of an older one."""
    aws.state.put_item(Item=CHAMPION)
    late = drop(aws, "a.jpg", jpeg(), sequencer="02")
    newest = aws.s3.put_object(Bucket=aws.bucket, Key="inbox/a.jpg", Body=jpeg((0, 0, 200)))["VersionId"]
    made = app.sequencer.after(app.sequencer.NONE, datetime.now(UTC))
    found = app.ObjectEvent(aws.bucket, "inbox/a.jpg", newest, made, 700)
    app.handler(events.sqs_batch(found.to_body()), context)
    app.handler(events.sqs_batch(late), context)
    assert current(aws, "a.jpg")["version_id"] == newest


@pytest.mark.parametrize("key", ["a b+c%20&=?#.jpg", "ö'\"\n\U0001f415.jpg", "x" * 1018])
def test_any_key_has_its_row_and_its_place_in_quarantine(aws, served, context, key):
    aws.state.put_item(Item=CHAMPION)
    app.handler(events.sqs_batch(drop(aws, key, jpeg())), context)
    assert current(aws, key)["status"] == "CLASSIFIED"
    app.handler(events.sqs_batch(drop(aws, key, b"no picture", sequencer="02")), context)
    assert current(aws, key)["status"] == "REJECTED"
    assert len(aws.s3.list_objects_v2(Bucket=aws.bucket, Prefix="quarantine/")["Contents"]) == 2
