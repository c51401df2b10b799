"""The lock, whatever runs do: never two at once, and never lost for good.

What takes, reads and frees it are the workflow's own states, executed one at a time with those of other runs in
between, against a real table; and start_retraining's look at it. end_run is a model of what they count on: it frees the
lock of the execution that it is told of, or hands it to one that repairs what that left, and touches no other's.
"""

import itertools
import json
from datetime import timedelta
from typing import Any

import boto3
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from ministack.services import stepfunctions as interpreter

from common import aws as aws_module
from common import clock, runs, state
from tests.makers import template

DEFINITION = json.loads((template.ROOT / "statemachine" / "retrain.asl.json").read_text())
MACHINE = "arn:aws:states:us-east-1:1:stateMachine:loop-retrain"
EXECUTION = MACHINE.replace(":stateMachine:", ":execution:")
SUBSTITUTIONS = {"LoopStateTable": "LoopState", "PollSeconds": "1", "EndRunFunction": "end_run"}
TAKEN, ENDS = "WhatFor", {"RunFailed": "FAILED", "HowItEnded": "SUCCEEDED"}


def states() -> dict[str, Any]:
    text = json.dumps(DEFINITION)
    for name, value in SUBSTITUTIONS.items():
        text = text.replace(f"${{{name}}}", value)
    return json.loads(text)["States"]


class TaskFailed(Exception):
    """A task's error, by the name that Catch knows."""


class Run:
    """One execution: its state, its variables, and how it stands with Step Functions."""

    def __init__(self, world: "Lock", name: str) -> None:
        self.world, self.arn, self.status, self.state = world, f"{EXECUTION}:{name}", "RUNNING", "Begin"
        execution = {"Id": self.arn, "StartTime": clock.iso(clock.now())}
        self.context: dict[str, Any] = {"Execution": execution, "StateMachine": {"Id": MACHINE}, "variables": {}}
        self.context["_query_language"] = "JSONata"

    @property
    def inside(self) -> bool:
        """It has the lock, and does what only one may do."""
        return self.status == "RUNNING" and self.state == TAKEN

    def step(self) -> None:
        """Execute one state."""
        definition = self.world.states[self.state]
        result = None
        if definition["Type"] == "Choice":
            rules = definition["Choices"]
            chosen = next((one for one in rules if self.evaluate(one["Condition"])), None)
            self.assign(chosen or {}, None, None)
            self.go(chosen["Next"] if chosen else definition["Default"])
            return
        if definition["Type"] == "Task":
            try:
                result = self.call(definition["Resource"], self.evaluate(definition["Arguments"]))
            except TaskFailed as error:
                catcher = next(c for c in definition["Catch"] if {str(error), "States.ALL"} & set(c["ErrorEquals"]))
                self.assign(catcher, None, {"Error": str(error), "Cause": ""})
                self.go(catcher["Next"])
                return
        self.assign(definition, result, None)
        self.go(definition["Next"])

    def go(self, name: str) -> None:
        self.state = name
        self.status = ENDS.get(name, self.status)
        if self.status == "FAILED":
            self.world.died.append(self.arn)

    def evaluate(self, value: Any, result: Any = None, error: Any = None) -> Any:
        return interpreter._apply_jsonata_template(value, {}, self.context, result, error)

    def assign(self, definition: dict[str, Any], result: Any, error: Any) -> None:
        assigned = {name: self.evaluate(value, result, error) for name, value in definition.get("Assign", {}).items()}
        self.context["variables"] |= assigned

    def call(self, resource: str, arguments: dict[str, Any]) -> Any:
        action = resource.removeprefix("arn:${Partition}:states:::")
        table = self.world.table
        if action == "lambda:invoke":
            self.world.end_run(arguments["Payload"]["detail"]["executionArn"])
            return {"Payload": {}}
        if action == "aws-sdk:sfn:describeExecution":
            if arguments["ExecutionArn"] not in self.world.runs:
                raise TaskFailed("Sfn.ExecutionDoesNotExistException")
            return {"Status": self.world.runs[arguments["ExecutionArn"]].status}
        calls = {"putItem": table.put_item, "getItem": table.get_item, "deleteItem": table.delete_item}
        try:
            return calls[action.removeprefix("dynamodb:")](**arguments)
        except ClientError as error:
            raise TaskFailed(f"DynamoDB.{aws_module.code(error)}") from None


class Lock(RuleBasedStateMachine):
    """Runs that begin, go on, end and die, and those who hear of it, too late, twice or never."""

    somebody = Bundle("somebody")
    names = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.states, self.table = states(), boto3.client("dynamodb")
        self.runs: dict[str, Run] = {}
        self.died: list[str] = []
        self.repairs = False
        state.table().delete_item(Key={"pk": "lock", "sk": "lock"})

    # What Lambda functions meet

    def describe_execution(self, executionArn: str) -> dict[str, str]:
        return {"status": self.runs[executionArn].status}

    def invoke(self, Payload: str, **_: Any) -> None:
        self.end_run(json.loads(Payload)["detail"]["executionArn"])

    def end_run(self, execution: str) -> None:
        assert self.runs[execution].status != "RUNNING", "it lives, and is said to be dead"
        if not self.repairs:
            state.free_lock(execution)
            return
        held = state.get("lock", "lock")
        if held and held["holder"] == execution:
            repair = self.begin_run()
            repair.state = TAKEN  # it finds the lock its own
            state.put("lock", "lock", held | {"holder": repair.arn})

    def begin_run(self) -> Run:
        run = Run(self, f"run-{next(self.names)}")
        self.runs[run.arn] = run
        return run

    @rule(target=somebody)
    def begin(self) -> Run:
        return self.begin_run()

    @rule(target=somebody, run=consumes(somebody), steps=st.integers(1, 12))
    def go_on(self, run: Run, steps: int) -> Any:
        for _ in range(steps):
            if run.status == "RUNNING" and run.state != TAKEN:
                run.step()
        return run if run.status == "RUNNING" else multiple()

    @rule(run=consumes(somebody))
    def end(self, run: Run) -> None:
        if run.inside:
            run.state = "FreeLock"
            run.step()
            assert run.status == "SUCCEEDED"

    @rule(run=consumes(somebody), told=st.booleans())
    def die(self, run: Run, told: bool) -> None:
        if run.status == "RUNNING":
            run.status = "ABORTED"
            self.died += [run.arn] * told

    @rule(times=st.integers(1, 2), repairs=st.booleans())
    def hear_of_a_death(self, times: int, repairs: bool) -> None:
        if self.died:
            self.repairs, execution = repairs, self.died.pop(0)
            for _ in range(times):
                self.end_run(execution)
            self.repairs = False

    @rule()
    def labels_look(self) -> None:
        obstacle = runs.obstacle()
        if any(run.inside for run in self.runs.values()):
            assert obstacle and "is running" in obstacle.why

    @invariant()
    def there_is_at_most_one_run_and_the_lock_names_it(self) -> None:
        inside = [run.arn for run in self.runs.values() if run.inside]
        assert len(inside) <= 1
        if inside:
            held = state.get("lock", "lock")
            assert held and held["holder"] == inside[0]

    def teardown(self) -> None:
        """Whoever died, and whoever heard of it: the next run gets the lock by itself."""
        for run in self.runs.values():
            run.status = run.status if run.status != "RUNNING" else "ABORTED"
        last = self.begin_run()
        for _ in range(20):
            if last.status == "RUNNING" and not last.inside:
                last.step()
        assert last.inside, last.context["variables"]["message"]


def test_there_is_never_more_than_one_run_and_the_lock_is_never_lost(aws, monkeypatch):
    monkeypatch.setenv("RETRAIN_STATE_MACHINE", MACHINE)
    client = aws_module.client
    machines: list[Lock] = []

    def begin() -> Lock:
        machines[:] = [Lock()]
        return machines[0]

    monkeypatch.setattr(
        aws_module, "client", lambda name: machines[0] if name in ("stepfunctions", "lambda") else client(name)
    )
    run_state_machine_as_test(
        begin,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate],  # to make a failure short takes minutes
        ),
    )


def test_workflow_and_functions_count_a_holder_that_is_not_known_yet_as_alive_for_as_long():
    new = DEFINITION["States"]["ReadLock"]["Assign"]["holderIsNew"]
    assert f" < {runs.KNOWN_AFTER // timedelta(milliseconds=1)} " in new
