"""tools/runs.py: what it shows of runs, which deployment it goes back to, what it asks of Step Functions."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import boto3
import pytest
from moto import mock_aws

from tests.makers import template
from tools import runs
from tools.stack import ToolError


def deployment(number: int, model: str, outcome: str = "PROMOTED") -> dict[str, Any]:
    return {
        "pk": "deployment", "sk": f"{number:06d}", "deployment": Decimal(number), "model_version": model, "run": model,
        "outcome": outcome, "accuracy": Decimal("0.91"), "precision": "int8", "began_at": "t",
        "message": f"of {number}",
    }  # fmt: skip


HISTORY = [  # newest first, as the table gives it
    deployment(5, "m1"), deployment(4, "m4", "ROLLED_BACK"), deployment(3, "m3"), deployment(2, "m2"),
    deployment(1, "m1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("live", "version", "expected"),
    [
        (HISTORY[0], None, 3),  # m1 is live again: before it was m3
        (HISTORY[2], None, 2),
        (HISTORY[0], "m2", 2),
        (HISTORY[2], "m1", 5),  # the newest of its deployments
        (HISTORY[2], "2", 2),
        (HISTORY[2], "4", 4),  # which failed; the workflow asks the registry
        (HISTORY[0], "m1", 5),  # which should be live; the workflow asks the endpoint
        (None, None, 5),
    ],
)
def test_which_deployment_is_gone_back_to(live: dict[str, Any] | None, version: str | None, expected: int):
    assert runs.choose(HISTORY, live, version)["deployment"] == expected


@pytest.mark.parametrize(
    ("live", "version", "text"),
    [
        (HISTORY[4], None, "no earlier model"),
        (HISTORY[0], "m9", "m9 was never deployed"),
    ],
)
def test_what_cannot_be_gone_back_to_is_said(live: dict[str, Any], version: str | None, text: str):
    with pytest.raises(ToolError, match=text):
        runs.choose(HISTORY, live, version)


def test_a_timeline_counts_a_loop_once():
    start = datetime(2026, 2, 26, tzinfo=UTC)
    names = ["Begin", "Wait", "Describe", "Wait", "Describe", "Done"]
    events: list[dict[str, Any]] = [
        {"type": "TaskStateEntered", "timestamp": start + timedelta(seconds=n), "stateEnteredEventDetails": {"name": x}}
        for n, x in enumerate(names)
    ]
    events.append({"type": "ExecutionSucceeded", "timestamp": start + timedelta(seconds=9)})
    assert [(name, seconds, times) for name, _, seconds, times in runs.timeline(events)] == [
        ("Begin", 1.0, 1), ("Wait", 2.0, 2), ("Describe", 2.0, 2), ("Done", 4.0, 1),
    ]  # fmt: skip


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[runs.Loop]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        table = template.resources("AWS::DynamoDB::Table")["LoopState"]
        kept = {name: table[name] for name in ("BillingMode", "AttributeDefinitions", "KeySchema")}
        boto3.client("dynamodb").create_table(TableName="LoopState", **kept)
        boto3.client("s3").create_bucket(Bucket="artifacts")
        states = {"StartAt": "Done", "States": {"Done": {"Type": "Succeed"}}}
        machine = boto3.client("stepfunctions").create_state_machine(
            name="houndloop-retrain", definition=json.dumps(states), roleArn="arn:aws:iam::123456789012:role/r"
        )["stateMachineArn"]
        outputs = {"LoopStateTableName": "LoopState", "RetrainStateMachineArn": machine}
        yield runs.Loop(outputs | {"ArtifactBucketName": "artifacts"})


def put(loop: runs.Loop, *items: dict[str, Any]) -> None:
    for item in items:
        loop.table.put_item(Item=item)


def run_item(run: str, outcome: str, **more: str) -> dict[str, Any]:
    execution = f"{machine_execution()}:{run}"
    return {"pk": "run", "sk": run, "outcome": outcome, "execution": execution, "message": "it is\n\x1bbetter"} | more


def machine_execution() -> str:
    return "arn:aws:states:us-east-1:123456789012:execution:houndloop-retrain"


def test_runs_are_listed_with_outcome_and_reason_newest_first(loop: runs.Loop, capsys):
    put(loop, run_item("1", "PROMOTED", trigger="labels"), run_item("2", "REJECTED", trigger="hand"))
    put(loop, {"pk": "lock", "sk": "lock", "run": "3", "holder": f"{machine_execution()}:3", "since": "noon"})
    assert runs.show_runs(loop, 20) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["3", "AT", "WORK", "since", "noon"],
        ["2", "REJECTED", "hand", "it", "is", "?better"],
        ["1", "PROMOTED", "labels", "it", "is", "?better"],
    ]


def test_a_run_is_shown_with_its_verdict_findings_and_deployment(loop: runs.Loop, capsys):
    put(loop, run_item("m4", "ROLLED_BACK", report="s3://r"), HISTORY[1])
    findings = {"blocking": True, "rules": [{"rule": "Overfit", "status": "IssuesFound"}]}
    for name, document in {"verdict": {"sentence": "better by 3%"}, "findings": findings}.items():
        boto3.client("s3").put_object(Bucket="artifacts", Key=f"runs/m4/{name}.json", Body=json.dumps(document))
    assert runs.show_run(loop, None) == 0
    out = capsys.readouterr().out
    assert (
        "run        m4: ROLLED_BACK" in out and "deployment 4: ROLLED_BACK of 4" in out and "report     s3://r" in out
    )
    assert "verdict    better by 3%" in out and "findings   Overfit; they block" in out
    assert "Step Functions no longer has its history." in out


def test_deployments_and_champion_are_shown(loop: runs.Loop, capsys):
    assert runs.show_champion(loop) == 0 and "No model is live yet." in capsys.readouterr().out
    put(loop, *HISTORY, HISTORY[0] | {"pk": "champion", "sk": "champion"})
    runs.show_deployments(loop)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["5", "4", "3", "2", "1", "*"] and "5 *" in lines[1]
    assert "ROLLED_BACK" in lines[2] and lines[2].endswith("of 4") and "91.0%" in lines[2]
    runs.show_champion(loop)
    assert "model_version  m1" in capsys.readouterr().out


def test_runs_are_started_with_what_was_asked_for(loop: runs.Loop, monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(runs.stack, "outputs", lambda stack: {})
    monkeypatch.setattr(runs, "Loop", lambda outputs: loop)
    monkeypatch.setattr(loop, "states", loop.states)
    real = loop.states.start_execution
    monkeypatch.setattr(loop.states, "start_execution", lambda **given: asked.append(given) or real(**given))
    for arguments in (["start", "--force"], ["start", "--snapshot", "abc", "--why", "again"]):
        monkeypatch.setattr("sys.argv", ["runs.py", *arguments])
        monkeypatch.setattr(runs, "name_of", lambda kind: f"{kind}-{len(asked)}")
        assert runs.main() == 0
    inputs = [json.loads(given["input"]) for given in asked]
    assert inputs[0] == {"trigger": "hand", "why": "", "force": True}
    assert inputs[1] == {"trigger": "hand", "why": "again", "force": False, "snapshot": "abc"}

    holder = real(stateMachineArn=loop.machine, name="at-work", input="{}")["executionArn"]
    put(loop, {"pk": "lock", "sk": "lock", "run": "3", "holder": holder, "since": "noon"})
    for arguments in (["start"], ["back"]):
        monkeypatch.setattr("sys.argv", ["runs.py", *arguments])
        assert runs.main() == 1, "one run at a time"
    assert len(asked) == 2
    loop.states.stop_execution(executionArn=holder)
    monkeypatch.setattr("sys.argv", ["runs.py", "start"])
    assert runs.main() == 0 and len(asked) == 3, "the workflow has a dead holder cleaned up after"


def test_a_run_is_stopped_with_a_reason_and_what_follows_is_told(loop: runs.Loop, capsys, monkeypatch):
    assert runs.stop(loop, "") == 0 and "No run is at work." in capsys.readouterr().out
    started = loop.states.start_execution(stateMachineArn=loop.machine, name="a", input="{}")["executionArn"]
    lock = {"pk": "lock", "sk": "lock", "run": "3", "holder": started, "since": "noon"}
    put(loop, lock)

    def end_run(_: float) -> None:
        """As end_run gives the lock to a recovery."""
        put(loop, lock | {"holder": f"{machine_execution()}:recover-3-1"})

    monkeypatch.setattr(runs.time, "sleep", end_run)
    assert runs.stop(loop, "wrong labels") == 0
    assert loop.states.describe_execution(executionArn=started)["status"] == "ABORTED"
    assert "Stopped the run 3. recover-3-1 sees to the endpoint." in capsys.readouterr().out


@pytest.mark.parametrize("known", [True, False])
def test_a_run_that_has_ended_cannot_be_stopped(loop: runs.Loop, capsys, known: bool):
    """Its event may be lost: waiting for the lock would have no end."""
    holder = f"{machine_execution()}:never"
    if known:
        holder = loop.states.start_execution(stateMachineArn=loop.machine, name="a", input="{}")["executionArn"]
        loop.states.stop_execution(executionArn=holder)
    put(loop, {"pk": "lock", "sk": "lock", "run": "3", "holder": holder, "since": "noon"})
    assert runs.stop(loop, "") == 1 and "has ended" in capsys.readouterr().out
