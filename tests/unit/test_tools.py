"""The tools that people run by hand, against AWS as moto fakes it."""

import io
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws
from PIL import Image, ImageColor

from tools import delete_stack, inbox, query, show, stack

ARN = "arn:aws:sqs:us-east-1:123456789012:"


@pytest.fixture
def sqs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        client: Any = boto3.client("sqs")
        for name in ("inbox", "reconcile", "dead"):
            client.create_queue(QueueName=name)
        yield client


def url(sqs: Any, name: str) -> str:
    return sqs.get_queue_url(QueueName=name)["QueueUrl"]


def bury(sqs: Any, body: str, target: str) -> None:
    """A dead letter as EventBridge writes it."""
    attribute = {"TARGET_ARN": {"DataType": "String", "StringValue": ARN + target}}
    sqs.send_message(QueueUrl=url(sqs, "dead"), MessageBody=body, MessageAttributes=attribute)


def bodies(sqs: Any, name: str) -> set[str]:
    found = set()
    while got := sqs.receive_message(QueueUrl=url(sqs, name), MaxNumberOfMessages=10).get("Messages"):
        found |= {message["Body"] for message in got}
    return found


def test_a_redrive_sends_each_message_where_it_failed(sqs, capsys, monkeypatch):
    for number in range(25):
        bury(sqs, f"picture {number}", "inbox")
    bury(sqs, "walk", "reconcile")
    assert inbox.redrive(url(sqs, "dead")) == 0
    assert "26 messages were sent again" in capsys.readouterr().out
    assert bodies(sqs, "inbox") == {f"picture {n}" for n in range(25)} and bodies(sqs, "reconcile") == {"walk"}
    assert bodies(sqs, "dead") == set()


def test_a_redrive_that_dies_loses_nothing(sqs, monkeypatch):
    for number in range(5):
        bury(sqs, str(number), "inbox")
    client = stack.client("sqs")
    deleted: list[str] = []

    class Dying:
        def delete_message(self, **arguments: Any) -> None:
            if len(deleted) == 2:
                raise KeyboardInterrupt
            deleted.append(arguments["ReceiptHandle"])
            client.delete_message(**arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

    monkeypatch.setattr(inbox, "client", lambda service: Dying())
    with pytest.raises(KeyboardInterrupt):
        inbox.redrive(url(sqs, "dead"))
    assert len(bodies(sqs, "inbox")) == 3, "the third was sent, and will be once more"
    assert inbox.levels(url(sqs, "dead"))["waiting"] + inbox.levels(url(sqs, "dead"))["in the works"] == 3


def test_a_message_that_does_not_say_where_it_failed_stays(sqs, capsys):
    sqs.send_message(QueueUrl=url(sqs, "dead"), MessageBody="hello")
    assert inbox.redrive(url(sqs, "dead")) == 1
    assert "1 stay in the queue" in capsys.readouterr().err
    assert sum(inbox.levels(url(sqs, "dead")).values()) == 1


@pytest.mark.parametrize(
    ("message", "origin"),
    [
        ({"Body": "b", "Attributes": {"DeadLetterQueueSourceArn": ARN + "inbox"}}, ("sqs", "inbox", "b")),
        (
            {"Body": "b", "Attributes": {}, "MessageAttributes": {"TARGET_ARN": {"StringValue": ARN + "labels"}}},
            ("sqs", "labels", "b"),
        ),
        (
            {
                "Body": json.dumps(
                    {
                        "requestContext": {"functionArn": "arn:aws:lambda:us-east-1:1:function:EndRun:$LATEST"},
                        "requestPayload": {"detail": 1},
                    }
                ),
                "Attributes": {},
            },
            ("lambda", "EndRun", '{"detail": 1}'),
        ),
        ({"Body": '{"detail": 1}', "Attributes": {}}, ("", "", '{"detail": 1}')),
        ({"Body": "[1]", "Attributes": {}}, ("", "", "[1]")),
    ],
    ids=["SQS moved it", "EventBridge", "Lambda", "unknown", "unknown list"],
)
def test_a_dead_letter_tells_where_it_failed(message: dict[str, Any], origin: tuple[str, str, str]):
    assert inbox.origin(message) == origin


@pytest.mark.parametrize(
    ("arguments", "selection"),
    [
        (["--review"], {"review": True}),
        (["--waiting"], {"status": "WAITING"}),
        (["--rejected", "--from", "2026-11-20", "--to", "2026-11-22"],
         {"status": "REJECTED", "from": "2026-11-20", "to": "2026-11-22"}),
        (["--class", "beagle", "--from", "2026-11-20"], {"class": "beagle", "from": "2026-11-20"}),
        (["--resume", '{"review": true, "sent": 5}'], {"review": True, "sent": 5}),
    ],
)  # fmt: skip
def test_the_command_line_of_a_replay(monkeypatch, arguments, selection):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(stack, "outputs", lambda name: {"stack": name})
    monkeypatch.setattr(inbox, "replay", lambda outputs, selected: asked.append(selected) or 0)
    monkeypatch.setattr(sys, "argv", ["inbox.py", "--stack", "mine", "replay", *arguments])
    assert inbox.main() == 0 and asked == [selection]


@pytest.mark.parametrize(
    "arguments", [["replay"], ["replay", "--class", "beagle"], ["replay", "--failed", "--from", "x"]]
)
def test_a_replay_that_does_not_say_of_what_is_refused(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["inbox.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        inbox.main()
    assert refused.value.code == 2


@pytest.mark.parametrize("tool", [(inbox, "--stack", "other", "backlog"), (delete_stack, "other")])
@pytest.mark.parametrize(
    ("code", "said"),
    [("ValidationError", "There is no stack other in us-east-1"), ("AccessDenied", "An error")],
)
def test_without_such_a_stack_there_is_one_line_that_says_so(monkeypatch, capsys, tool, code, said):
    class CloudFormation:
        meta = SimpleNamespace(region_name="us-east-1")

        def describe_stacks(self, **_: Any) -> None:
            raise ClientError({"Error": {"Code": code, "Message": "it says no"}}, "DescribeStacks")

    monkeypatch.setattr(stack, "client", lambda service: CloudFormation())
    module, *arguments = tool
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    assert module.main() == 1
    assert capsys.readouterr().err.startswith(said)


def test_a_table_of_rows_has_one_line_each_whatever_is_in_a_key(capsys):
    query.write([{"status": "CLASSIFIED", "key": "inbox/a\nb\x1b.jpg", "label": "beagle"}], "table")
    head, line = capsys.readouterr().out.splitlines()
    assert head.startswith("updated_at") and "inbox/a b?.jpg" in line


# --- delete_stack.py ---


@mock_aws
def test_what_is_deleted_is_said_to_be_of_an_account_or_of_this_machine(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.delenv("AWS_REGION", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert delete_stack.where() == "the account 123456789012 in eu-west-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:4566")
    assert delete_stack.where() == "AWS on this machine (http://127.0.0.1:4566)"


# --- show.py ---

CLASSES = [{"class": "beagle", "probability": 0.75}, {"class": "boxer", "probability": 0.25}]


class Runtime:
    """An endpoint that answers, or refuses as a container's refusal reaches boto3."""

    def __init__(self, refusal: dict[str, Any] | None = None) -> None:
        self.refusal, self.asked = refusal, 0

    def invoke_endpoint(self, EndpointName: str, ContentType: str, Body: bytes) -> dict[str, Any]:
        self.asked += 1
        assert EndpointName == "mine" and ContentType.startswith("image/")
        if self.refusal and b"refused" in Body:
            raise ClientError({"Error": {"Code": "ModelError", "Message": "…"}} | self.refusal, "InvokeEndpoint")
        answer = {"model_version": "260101000000", "deployment": 1, "predictions": [{"classes": CLASSES}]}
        return {"Body": io.BytesIO(json.dumps(answer).encode())}


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(stack, "client", lambda service: runtime)
    return runtime


def picture(size: tuple[int, int] = (300, 100), orientation: int = 1) -> bytes:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def run_show(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["show.py", "--endpoint", "mine", *arguments])
    return show.main()


def test_a_picture_is_shown_with_its_label_and_confidences(tmp_path, monkeypatch, capsys, runtime):
    path = tmp_path / "dog.jpg"
    path.write_bytes(picture())
    assert run_show(monkeypatch, str(path), "--output", str(tmp_path / "out"), "--classes", "1") == 0
    said = capsys.readouterr().out
    assert "beagle 75.0% (model 260101000000)" in said and "boxer" not in said
    with Image.open(tmp_path / "out" / "dog-labelled.png") as drawn:
        assert drawn.width == show.WIDTH and drawn.height == show.WIDTH // 3 + show.LINE + 2 * show.MARGIN


def test_before_a_first_model_it_is_said_that_there_is_none(tmp_path, monkeypatch, capsys, runtime):
    def refuse(**_: Any) -> None:
        error = {"Code": "ValidationError", "Message": "Endpoint mine of account 1 not found."}
        raise ClientError({"Error": error}, "InvokeEndpoint")

    monkeypatch.setattr(runtime, "invoke_endpoint", refuse)
    (tmp_path / "dog.jpg").write_bytes(picture())
    assert run_show(monkeypatch, str(tmp_path / "dog.jpg"), "--output", str(tmp_path)) == 1
    assert "no model is live" in capsys.readouterr().err


def test_bars_are_as_long_as_the_confidences(monkeypatch):
    sheet = show.draw(picture((640, 100)), CLASSES)
    fill = {ImageColor.getrgb(colour): colour for colour in (show.FIRST, show.BAR, show.PALE)}
    across = sheet.width - 2 * show.MARGIN
    for number, (each, bar) in enumerate(zip(CLASSES, (show.FIRST, show.BAR), strict=True)):
        y = 100 + show.MARGIN + number * show.LINE + 5  # above the text
        row = [fill.get(sheet.getpixel((x, y))) for x in range(sheet.width)]
        assert abs(row.count(bar) - each["probability"] * across) <= 2 and show.PALE in row


def test_a_picture_is_drawn_the_way_up_it_was_taken():
    """Orientation 3 is upside down: what is stored on the left is seen on the right."""
    sheet = show.draw(picture((640, 100), orientation=3), CLASSES)
    assert sheet.getpixel((10, 50))[2] > 200 and sheet.getpixel((630, 50))[0] > 200


def test_what_the_container_refuses_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys, runtime):
    error = {"error": {"code": "BrokenImage", "message": "truncated"}}
    runtime.refusal = {"OriginalStatusCode": 400, "OriginalMessage": json.dumps(error)}
    (tmp_path / "bad.jpg").write_bytes(b"refused")
    (tmp_path / "good.jpg").write_bytes(picture())
    paths = [str(tmp_path / name) for name in ("bad.jpg", "missing.jpg", "good.jpg")]
    assert run_show(monkeypatch, *paths, "--output", str(tmp_path)) == 1
    told = capsys.readouterr()
    assert "bad.jpg: truncated (400 BrokenImage)" in told.err and "missing.jpg" in told.err
    assert "good.jpg: beagle" in told.out and runtime.asked == 2


def test_an_answer_that_is_no_json_is_told_as_it_is():
    assert show.reason({"OriginalStatusCode": 502, "OriginalMessage": "<html>"}) == "the endpoint answered 502: <html>"
