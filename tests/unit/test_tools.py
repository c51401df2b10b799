"""The tools that people run by hand, against AWS as moto fakes it."""

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws

from tools import inbox, query, stack

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


def test_without_such_a_stack_there_is_one_line_that_says_so(monkeypatch, capsys):
    class CloudFormation:
        meta = SimpleNamespace(region_name="us-east-1")

        def describe_stacks(self, **_: Any) -> None:
            message = "Stack with id other does not exist"
            raise ClientError({"Error": {"Code": "ValidationError", "Message": message}}, "DescribeStacks")

    monkeypatch.setattr(stack, "client", lambda service: CloudFormation())
    monkeypatch.setattr(sys, "argv", ["inbox.py", "--stack", "other", "backlog"])
    assert inbox.main() == 1
    assert capsys.readouterr().err.startswith("There is no stack other in us-east-1")


def test_a_table_of_rows_has_one_line_each_whatever_is_in_a_key(capsys):
    query.write([{"status": "CLASSIFIED", "key": "inbox/a\nb\x1b.jpg", "label": "beagle"}], "table")
    head, line = capsys.readouterr().out.splitlines()
    assert head.startswith("updated_at") and "inbox/a?b?.jpg" in line
