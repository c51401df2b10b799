"""Runs of the workflow, for the functions that start them: what keeps one from starting now, and its start."""

import json
import os
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from boto3.dynamodb.conditions import Key
from botocore.exceptions import ClientError

from common import aws, clock, state

DAY = timedelta(days=1)
RUN_ID = "%y%m%d%H%M%S"  # the start of an execution, as the workflow's Begin makes it
# DescribeExecution is eventually consistent: one that has just taken the lock may not be known yet.
KNOWN_AFTER = timedelta(minutes=15)
CLEAN_UP_SECONDS = 60
ALIVE = {"RUNNING", "PENDING_REDRIVE"}
# They train nothing, so they do not count among the runs of a day.
NO_TRAINING = {"back", "recovery"}


class Obstacle(NamedTuple):
    """Why no run may start now, and after how many seconds it is worth asking again (None: when it has ended)."""

    why: str
    seconds: float | None
    holder: str = ""
    """The execution that holds the lock, if that is it."""


def obstacle() -> Obstacle | None:
    """What keeps a run from starting now: another one, or as many as one day may have."""
    return _another_run() or _enough_for_a_day()


def start(name: str, document: dict[str, Any], attempts: int = 1) -> str | None:
    """Start an execution called `name`, unless it runs; returns its name, or None where it ran and ended before.

    Of an execution that has ended no second one can have the name, for 90 days. With `attempts` others may follow.
    """
    machine = os.environ["RETRAIN_STATE_MACHINE"]
    for attempt in range(attempts):
        this = f"{name}-{attempt}" if attempt else name
        try:
            aws.client("stepfunctions").start_execution(stateMachineArn=machine, name=this, input=json.dumps(document))
            return this
        except ClientError as error:
            if aws.code(error) != "ExecutionAlreadyExists":
                raise
        status = _status(f"{machine.replace(':stateMachine:', ':execution:')}:{this}")
        if status in ALIVE:
            return this
        if status == "ABORTED":  # somebody stopped it, and meant it
            return None
    return None


def _another_run() -> Obstacle | None:
    """The run that holds the lock. A dead one is cleaned up after, by end_run, which frees the lock or hands it on.

    Only end_run knows whether the dead run left an endpoint half updated; nobody else frees the lock of another.
    """
    lock = state.get("lock", "lock")
    if lock is None:
        return None
    holder = lock["holder"]
    status = _status(holder)
    if status is None:
        # A recovery has the lock before it begins, and end_run begins it.
        new = "recovery" not in lock and clock.now() - clock.parse(lock["since"]) < KNOWN_AFTER
        status = "RUNNING" if new else "ABORTED"
    if status in ALIVE:
        return Obstacle(f"{_name(holder)} is running", None, holder)
    aws.client("lambda").invoke(
        FunctionName=os.environ["END_RUN_FUNCTION"],
        InvocationType="Event",
        Payload=json.dumps({"detail": {"executionArn": holder}}),
    )
    why = f"{_name(holder)} has ended ({status}) with the lock, and is cleaned up after"
    return Obstacle(why, CLEAN_UP_SECONDS, holder)


def _enough_for_a_day() -> Obstacle | None:
    most, now = int(os.environ["MAX_RUNS_PER_DAY"]), clock.now()
    begun = sorted(_begun_since(now - DAY))
    if len(begun) < most:
        return None
    free = begun[-most] + DAY
    why = f"of at most {most} runs within 24 hours {len(begun)} began; the next may at {clock.iso(free)}"
    return Obstacle(why, max(1.0, (free - now).total_seconds()))


def _begun_since(since: datetime) -> list[datetime]:
    """When those runs began that trained or tried to. They are recorded as they end, before the lock is free."""
    query: dict[str, Any] = {"KeyConditionExpression": Key("pk").eq("run") & Key("sk").gte(since.strftime(RUN_ID))}
    begun: list[datetime] = []
    while True:
        page = state.table().query(**query, ConsistentRead=True)
        for item in page["Items"]:
            if item["outcome"] != "NOTHING_NEW" and item.get("trigger") not in NO_TRAINING:
                begun.append(datetime.strptime(item["sk"], RUN_ID).replace(tzinfo=UTC))
        if "LastEvaluatedKey" not in page:
            return begun
        query["ExclusiveStartKey"] = page["LastEvaluatedKey"]


def _status(execution: str) -> str | None:
    """What Step Functions says of the execution; None where it knows none, as 90 days after its end."""
    try:
        return aws.client("stepfunctions").describe_execution(executionArn=execution)["status"]
    except ClientError as error:
        if aws.code(error) != "ExecutionDoesNotExist":
            raise
        return None


def _name(execution: str) -> str:
    return execution.rpartition(":")[2]
