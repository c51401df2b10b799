"""Starts one retraining run once the labels have been quiet for long enough, if there is something to learn.

A message carries the revision of the ledger that it was sent for; when the ledger has moved on, a later message speaks
for it. So however many labels arrive, one message gets through, and its run is named for the revision: it cannot start
twice.
"""

import json
import os
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.exceptions import ClientError

from common import aws, clock, dataset, ledger, quiet, state
from common.tracing import tracer

logger = Logger()


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    processor = BatchProcessor(EventType.SQS, raise_on_entire_batch_failure=False)
    with processor(event["Records"], handler=_consider_record):
        processor.process()
    return dict(processor.response())


def _consider_record(record: SQSRecord) -> None:
    outcome = consider(int(json.loads(record.body)["revision"]))
    logger.info(outcome)


def consider(revision: int) -> str:
    """Start a run for the ledger as it stands at `revision`, or not; says what was done and why."""
    entry = ledger.read()
    if entry is None or entry.revision != revision:
        return f"the labels changed since revision {revision}; a later message speaks for them"
    quiet_for = (clock.now() - clock.parse(entry.changed_at)).total_seconds()
    if quiet_for < quiet.period_seconds():
        quiet.ask_again(revision, quiet.period_seconds() - quiet_for + 1)
        return f"the labels have been quiet for {quiet_for:.0f} of {quiet.period_seconds()} s"
    if holder := state.lock_is_held(is_running):
        quiet.ask_again(revision, max(5, quiet.period_seconds()))
        return f"{holder} is running; the new labels wait for it to end"
    contents = ledger.contents()
    found = dataset.assemble(contents.labels, contents.splits, int(os.environ["MIN_PICTURES_PER_CLASS"]))
    if reason := dataset.why_too_small(found):
        return f"no run: {reason}"
    if state.get("dataset", found.hash):
        return 'no run: this very dataset was trained already; start an execution with {"force": true} to repeat it'
    if missing := missing_pictures(contents.labels):
        return f"no run: {missing} new pictures missing of the {os.environ['MIN_NEW_PICTURES']} that a run needs"
    name = f"labels-{revision}-{entry.changed_at[:19].translate({ord(c): None for c in '-:T'})}"
    try:
        aws.client("stepfunctions").start_execution(
            stateMachineArn=os.environ["RETRAIN_STATE_MACHINE"],
            name=name,
            input=json.dumps({"trigger": "labels", "revision": revision, "force": False}),
        )
    except ClientError as error:
        if aws.code(error) != "ExecutionAlreadyExists":
            raise
        return f"{name} runs already"
    return f"started {name} on {len(found.pictures)} pictures of {len(found.classes)} classes"


def is_running(execution: str) -> bool:
    return aws.client("stepfunctions").describe_execution(executionArn=execution)["status"] == "RUNNING"


def missing_pictures(labels: list[dict[str, Any]]) -> int:
    """How many more labels must be registered after the last run before the next may start."""
    last = state.get("dataset", "last")
    since = last["trained_at"] if last else ""
    fresh = sum(1 for label in labels if label["registered_at"] > since)
    return max(0, int(os.environ["MIN_NEW_PICTURES"]) - fresh) if last else 0
