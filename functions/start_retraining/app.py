"""Starts one retraining run once the labels were quiet or have waited for long enough, if it would learn something.

A message carries the revision of the ledger that it was sent for; when the ledger has moved on, a later message speaks
for it. So however many labels arrive, one message gets through. Where labels never become quiet none would: then any
message will do, once they have waited for the longest time. The run is named for the time since which they wait, so it
cannot start twice; and its message goes round until a snapshot has taken them, so it cannot be lost.

What was decided, and why, is in LoopState: decision/last.
"""

import json
import os
from datetime import datetime
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from aws_lambda_powertools.utilities.typing import LambdaContext

from common import clock, dataset, ledger, quiet, runs, state
from common.tracing import tracer
from start_retraining import decide
from start_retraining.worth import worth_a_run

logger = Logger()

ATTEMPTS = 3  # runs that end before they have taken a snapshot: refused by the lock, or in trouble from the start
LOOK_AGAIN_SECONDS = 60


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
    """Start a run for the labels that wait, or not, or have it considered later; says what was done and why."""
    now, entry = clock.now(), ledger.read()
    if entry is None or entry.waiting_since is None:
        return "no labels wait"
    # Only the newest message goes round; the others would become ever more.
    newest = entry.revision == revision
    wait = decide.seconds_to_wait(entry, now, quiet.period_seconds(), quiet.longest_wait_seconds())
    if wait > 0:
        if not newest:
            return f"the labels changed since revision {revision}; a later message speaks for them"
        quiet.ask_again(revision, wait)
        return _decided("WAITS", now, entry, f"the labels are not quiet yet; {wait:.0f} s to go")
    name = f"labels-{''.join(filter(str.isdigit, entry.waiting_since))}"
    if obstacle := runs.obstacle():
        if newest:
            quiet.ask_again(revision, obstacle.seconds or max(5, quiet.period_seconds()))
        if obstacle.seconds is None and name in obstacle.holder:
            return f"{name} is about to take these labels"
        return _decided("WAITS", now, entry, f"{obstacle.why}; the labels wait")
    contents = ledger.contents()
    found = dataset.assemble(contents.labels, contents.splits, int(os.environ["MIN_PICTURES_PER_CLASS"]))
    learns, why, facts = worth_a_run(found)
    if not learns:
        ledger.settle(entry.revision, clock.iso(now))
        return _decided("NO_RUN", now, entry, f"no run: {why}", **facts)
    document = {"trigger": "labels", "why": why, "revision": entry.revision, "force": False}
    started = runs.start(name, document, ATTEMPTS)
    if started is None:
        ledger.settle(entry.revision, clock.iso(now))
        why = f"no run: {name} was stopped, or ended {ATTEMPTS} times, before it took these labels; start one by hand"
        return _decided("NO_RUN", now, entry, why, **facts)
    if newest:
        quiet.ask_again(revision, LOOK_AGAIN_SECONDS)
    return _decided("STARTED", now, entry, f"started {started}: {why}", execution=started, **facts)


def _decided(decision: str, now: datetime, entry: ledger.Ledger, why: str, **facts: Any) -> str:
    """Keep the decision where people find it; returns its reason."""
    ages = {"revision": entry.revision, "changed_at": entry.changed_at, "waiting_since": entry.waiting_since}
    state.put("decision", "last", {"decision": decision, "why": why, "at": clock.iso(now)} | ages | facts)
    return why
