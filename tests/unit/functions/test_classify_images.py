"""From a batch of inbox messages to rows, with an endpoint that does as it is told."""

import io
import json
from typing import Any

import pytest
from botocore.exceptions import ClientError
from PIL import Image

from classify_images import app
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
    monkeypatch.setattr(app, "fetch", lambda event: pytest.fail("fetched"))
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
    aws.state.put_item(Item=CHAMPION)
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
    fetch = app.fetch

    def failing(event: Any) -> bytes:
        if event.key.endswith("1.jpg"):
            raise ClientError({"Error": {"Code": "SlowDown", "Message": "later"}}, "GetObject")
        return fetch(event)

    monkeypatch.setattr(app, "fetch", failing)
    answer = app.handler(events.sqs_batch(*bodies), context)
    assert answer == {"batchItemFailures": [{"itemIdentifier": "message-1"}]}
    assert current(aws, "0.jpg")["status"] == current(aws, "2.jpg")["status"] == "CLASSIFIED"
    assert current(aws, "1.jpg") is None


def test_the_last_try_leaves_a_failed_row_with_the_error(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    body = drop(aws, "a.jpg", jpeg())
    monkeypatch.setattr(app, "fetch", lambda event: 1 / 0)
    answer = app.handler(events.sqs_batch(body, receives=5), context)
    assert answer["batchItemFailures"] and "ZeroDivisionError" in current(aws, "a.jpg")["reason"]


def test_a_last_try_that_kills_the_function_is_failed_already(aws, served, context, monkeypatch):
    aws.state.put_item(Item=CHAMPION)
    body = drop(aws, "a.jpg", jpeg())

    def die(event: Any) -> bytes:
        row = current(aws, "a.jpg")
        assert row["status"] == "FAILED" and "did not finish" in row["reason"]
        raise SystemExit

    monkeypatch.setattr(app, "fetch", die)
    with pytest.raises(SystemExit):
        app.handler(events.sqs_batch(body, receives=5), context)


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
