"""The workflow's beginning and end, as the local Step Functions executes them: what becomes of another run's lock,
and what is classified again after a promotion.

What start_retraining and end_run do about a lock, deployed and with IAM, is in test_loop.
"""

import json
import time
from typing import Any

import boto3
import pytest

from local.emulator import Emulator
from tests.integration.test_workflow import Workflow, findings, found
from tests.makers.waiting import wait_for

BEFORE_THE_LOCK = {"Begin", "TakeLock", "ReadLock", "IsLocked", "DescribeHolder", "IsHolderDead"}


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory):
    with Emulator(state=tmp_path_factory.mktemp("aws")) as emulator:
        yield emulator


@pytest.fixture
def workflow(aws: Emulator) -> Workflow:
    workflow, session = Workflow(aws), boto3.Session("test", "test", region_name="us-east-1")
    allow = {"Effect": "Allow", "Action": ["states:DescribeExecution", "lambda:InvokeFunction"], "Resource": "*"}
    session.client("iam", endpoint_url=aws.endpoint_url).put_role_policy(
        RoleName=workflow.name,
        PolicyName="ask",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [allow]}),
    )
    return workflow


def another(workflow: Workflow, seconds: int) -> str:
    """The ARN of an execution that takes so long."""
    definition = {"StartAt": "Wait", "States": {"Wait": {"Type": "Wait", "Seconds": seconds, "End": True}}}
    machine = workflow.states.create_state_machine(
        name=f"{workflow.name}-other-{seconds}", definition=json.dumps(definition), roleArn=workflow.role
    )["stateMachineArn"]
    return workflow.states.start_execution(stateMachineArn=machine)["executionArn"]


def lock(workflow: Workflow, holder: str, since: str = "") -> dict[str, Any]:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    item = {"pk": "lock", "sk": "lock", "holder": holder, "run": "1", "since": since or now}
    workflow.table.put_item(TableName=workflow.name, Item={name: {"S": value} for name, value in item.items()})
    return item


def refused(workflow: Workflow) -> tuple[str, list[str]]:
    """Why a run is refused, and the states that it was in."""
    why = workflow.run(found(findings()), status="FAILED", PollSeconds="0")["why"]
    return why, workflow.visited


def test_a_run_that_meets_a_living_one_is_refused_and_leaves_the_lock(workflow: Workflow):
    holder = another(workflow, 60)
    item = lock(workflow, holder)
    why, visited = refused(workflow)
    assert why == f"another run holds the lock: {holder} (RUNNING)" and set(visited) == BEFORE_THE_LOCK
    assert workflow.item("lock", "lock") == item
    workflow.states.stop_execution(executionArn=holder)


def test_a_dead_run_is_ended_before_the_lock_is_tried_again_and_not_for_ever(workflow: Workflow):
    """Here nobody frees the lock, as end_run does not while it cannot."""
    holder = another(workflow, 0)
    wait_for(lambda: workflow.states.describe_execution(executionArn=holder)["status"] == "SUCCEEDED")
    item = lock(workflow, holder)
    why, visited = refused(workflow)
    assert why == f"another run holds the lock: {holder} (SUCCEEDED)"
    assert visited.count("TakeLock") == 5 and visited.count("EndHolder") == 4 and "PublishSources" not in visited
    assert workflow.arguments("EndHolder")["Payload"] == {"detail": {"executionArn": holder}}
    assert workflow.item("lock", "lock") == item


@pytest.mark.parametrize(
    ("since", "more", "ended"),
    [("", {}, False), ("2026-01-01T00:00:00.000Z", {}, True), ("", {"recovery": {"S": "{}"}}, True)],
    ids=["just begun", "forgotten", "a recovery that has not begun"],
)
def test_a_holder_that_step_functions_does_not_know(workflow: Workflow, since: str, more: dict, ended: bool):
    item = lock(workflow, "arn:aws:states:us-east-1:000000000000:execution:other:gone", since)
    values = {name: {"S": value} for name, value in item.items()} | more
    workflow.table.put_item(TableName=workflow.name, Item=values)
    why, visited = refused(workflow)
    assert why.endswith("(unknown to Step Functions)") and ("EndHolder" in visited) == ended
    if ended:
        assert workflow.arguments("EndHolder")["Payload"] == {"detail": {"executionArn": item["holder"]}}


def test_who_started_a_run_and_why_is_recorded(workflow: Workflow):
    workflow.run(found(findings()))
    assert (workflow.record["trigger"], workflow.record["why"]) == ("hand", "")
    last = workflow.item("dataset", "last")
    assert (last["hash"], json.loads(last["classes"])) == ("d", ["a", "b"])


ANOTHER_PAGE = "{'Payload': $merge([$replay ? $replay : {'status': 'WAITING'}, {'next': null}])}"


@pytest.mark.parametrize(("wanted", "replayed"), [("true", ["WAITING", "review"]), ("false", ["WAITING"])])
def test_after_a_promotion_the_unsure_pictures_are_classified_again_if_wanted(workflow: Workflow, wanted, replayed):
    """After those that waited."""
    workflow.run(found(findings()) | {"Replay": ANOTHER_PAGE}, ReclassifyUnsure=wanted)
    assert workflow.visited.count("Replay") == len(replayed)
    payload = workflow.arguments("Replay")["Payload"]
    assert payload == ({"review": True} if wanted == "true" else {"status": "WAITING"})
    assert workflow.output["outcome"] == "PROMOTED"


def test_a_model_is_live_also_where_pictures_cannot_be_replayed(workflow: Workflow):
    """There is no such function here."""
    output = workflow.run(found(findings()), real=["Replay"])
    assert output["outcome"] == "PROMOTED" and "; not all pictures were replayed: " in output["why"]
