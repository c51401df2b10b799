"""Keeps the ledger of labels true to what lies under labelled/<class>/ and to the label files under labels/, and asks
for a run when it has been quiet.

Each picture is kept once under its content's hash, which is what datasets name: the labelled object may go later.
"""

import time
from typing import Any

from aws_lambda_powertools import Logger, Metrics
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from aws_lambda_powertools.utilities.typing import LambdaContext

from common import ledger, quiet
from common.events import ObjectEvent
from common.names import BadLabel
from common.tracing import tracer
from preprocessing import BrokenImage
from register_labels import files, pictures

logger = Logger()
metrics = Metrics()


@logger.inject_lambda_context
@metrics.log_metrics(capture_cold_start_metric=True)
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    ends = time.monotonic() + context.get_remaining_time_in_millis() / 1000
    processor = BatchProcessor(EventType.SQS, raise_on_entire_batch_failure=False)
    # An invocation that recorded changes may have died before it could ask: this one asks for it, even when nothing is
    # new, and before it works at what the other may have died of.
    if any(int(record["attributes"]["ApproximateReceiveCount"]) > 1 for record in event["Records"]):
        _ask()
    with processor(event["Records"], handler=lambda record: _take(record, ends)):
        processor.process()
    _ask()
    return dict(processor.response())


def _ask() -> None:
    entry = ledger.read()
    if entry and entry.waiting_since:
        quiet.ask_again(entry.revision, quiet.period_seconds())


def _take(record: SQSRecord, ends: float) -> None:
    if part := files.Part.from_body(record.body):
        labels, rejected = files.read_part(part, ends)
        for name in {label["class"] for label in labels}:
            _tell_of_spelling(name, part.image)
        _count(labels, rejected)
        return
    event = ObjectEvent.from_body(record.body)
    if event.key.startswith(files.FOLDER):
        files.begin(event)
    else:
        register(event)


def register(event: ObjectEvent) -> None:
    """Record one labelled object; what cannot be a label is recorded as REJECTED, with the reason."""
    news = ledger.news(event, ledger.get(event))
    if news is None:
        return
    event = news
    if event.deleted:
        ledger.record(event, status="DELETED")
        return
    try:
        class_name = ledger.class_of(event.key)
        taken = pictures.take(event)
    except (BadLabel, BrokenImage) as reason:
        logger.warning("not a label", extra={"image": event.image, "reason": str(reason)})
        if ledger.record(event, status="REJECTED", reason=str(reason)):
            _count([], [event])
        return
    if taken is None:
        return  # deleted meanwhile, of which another event tells
    sha256, phash = taken
    _tell_of_spelling(class_name, event.image)
    if ledger.record(event, status="ACTIVE", sha256=sha256, phash=phash, **{"class": class_name}):
        _count([event], [])


def _tell_of_spelling(name: str, where: str) -> None:
    """Warn at once; which spelling is right is decided when a dataset is assembled, whatever came first."""
    first = ledger.first_spelling(name)
    if first != name:
        logger.warning("two spellings of one class", extra={"spelling": name, "first": first, "where": where})
        metrics.add_metric("LabelsMisspelled", MetricUnit.Count, 1)


def _count(labels: list[Any], rejected: list[Any]) -> None:
    for name, found in (("LabelsRegistered", labels), ("LabelsRejected", rejected)):
        if found:
            metrics.add_metric(name, MetricUnit.Count, len(found))
