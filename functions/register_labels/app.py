"""Keeps the ledger of labels true to what lies under labelled/<class>/, and asks for a run when it has been quiet.

Each picture is kept once under its content's hash, which is what datasets name: the labelled object may go later.
"""

import hashlib
import os
from typing import Any

from aws_lambda_powertools import Logger, Metrics
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from aws_lambda_powertools.utilities.typing import LambdaContext
from PIL import Image

from common import ledger, quiet
from common.events import ObjectEvent
from common.objects import fetch, put_if_absent
from common.tracing import tracer
from preprocessing import BrokenImage, decode

logger = Logger()
metrics = Metrics()


@logger.inject_lambda_context
@metrics.log_metrics(capture_cold_start_metric=True)
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    processor = BatchProcessor(EventType.SQS, raise_on_entire_batch_failure=False)
    with processor(event["Records"], handler=lambda record: register(_event(record))):
        processor.process()
    # Asked even when nothing was new: the invocation that recorded the change may have died before it could ask.
    entry = ledger.read()
    if entry:
        quiet.ask_again(entry.revision, quiet.period_seconds())
    return dict(processor.response())


def register(event: ObjectEvent) -> None:
    """Record one label; what cannot be a label is recorded as REJECTED, with the reason."""
    if event.is_folder_marker or ledger.is_recorded(event):
        return
    if event.deleted:
        ledger.record(event, status="DELETED")
        return
    try:
        class_name = ledger.class_of(event.key)
        most = int(os.environ["MAX_IMAGE_BYTES"])
        if event.size > most:
            raise BrokenImage(f"larger than {most // 1_000_000} MB: {event.size / 1e6:.1f} MB")
        data = fetch(event)
        if data is None:
            return
        limits = {"max_pixels": int(os.environ["MAX_IMAGE_PIXELS"]), "min_side": int(os.environ["MIN_IMAGE_SIDE"])}
        phash = difference_hash(decode(data, max_bytes=most, **limits))
    except (ledger.BadLabel, BrokenImage) as reason:
        logger.warning("not a label", extra={"image": event.image, "reason": str(reason)})
        ledger.record(event, status="REJECTED", reason=str(reason))
        metrics.add_metric("LabelsRejected", MetricUnit.Count, 1)
        return
    sha256 = keep(data)
    split = ledger.split_of(class_name, phash)
    if ledger.record(event, status="ACTIVE", sha256=sha256, phash=phash, split=split, **{"class": class_name}):
        metrics.add_metric("LabelsRegistered", MetricUnit.Count, 1)


def keep(data: bytes) -> str:
    """Store the picture under its content's hash, unless it is there; returns the hash."""
    sha256 = hashlib.sha256(data).hexdigest()
    put_if_absent(os.environ["ARTIFACT_BUCKET"], f"images/{sha256}", data)
    return sha256


def difference_hash(picture: Image.Image) -> str:
    """64 bits, as 16 hexadecimal digits: is each pixel of the picture at 9x8, in grey, darker than its right neighbour?

    Survives rescaling and recompression (Krawetz 2013, 'Kind of Like That').
    """
    small = picture.convert("L").resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            bits = bits << 1 | (small[row * 9 + column] < small[row * 9 + column + 1])
    return f"{bits:016x}"


def _event(record: SQSRecord) -> ObjectEvent:
    return ObjectEvent.from_body(record.body)
