"""Finds pictures in the inbox whose event was lost, and enqueues them.

A walk goes through `inbox/` page by page, in the order of the keys. Lost is a picture whose newest version is not its
current row's, and one that waits although a model is live. What was answered about the newest version, be it
CLASSIFIED, REJECTED or FAILED, is left alone, and so is what was written a moment ago: its event is on its way. A
deleted picture counts as long as S3 keeps its versions: its row, if it has one, speaks of the newest of them.

The schedule or a person starts a walk by a message; what one invocation does not finish, a message of its own
continues. The backlog of the inbox bounds how fast lost pictures are enqueued: while it is long, the walk waits, so
that neither fresh pictures nor an endpoint in trouble feel it, and queued pictures are not taken for lost.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from aws_lambda_powertools import Logger, Metrics
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext

from common import aws, clock, inbox, predictions, sequencer, state
from common.events import ObjectEvent
from common.tracing import tracer

logger = Logger()
metrics = Metrics()

PAGE = 1000  # versions; ListObjectVersions gives no more at once
MAX_KEYS = 100  # BatchGetItem
WAIT_SECONDS = 60
MIN_AGE_SECONDS = 900  # an event takes seconds; what is older and has no row is queued far back, or lost
MIN_TIME_MS = 30_000  # the next page must fit into what is left of the invocation

Marker = dict[str, str]


class Found(NamedTuple):
    """The newest version of one object, as S3 lists it."""

    key: str
    version_id: str
    size: int
    written: datetime
    deleted: bool  # by a marker, which is newer


@logger.inject_lambda_context
@metrics.log_metrics
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Takes `{}` (or `{"min_age_seconds": 0}`) to start a walk, and its own messages to continue one."""
    for record in event["Records"]:
        message = json.loads(record["body"])
        if "walk" not in message:
            message["walk"] = record["messageId"]  # of a try that failed at once the next goes on with the same walk
            if not state.begin_walk(message["walk"], message.get("started_by", "command")):
                logger.info("a walk is on its way already; it will see what is lost")
                continue
        walk_on(message, context)
    return {"batchItemFailures": []}


def walk_on(message: dict[str, Any], context: LambdaContext) -> None:
    """Go through pages until the inbox has been seen, the time is over, or the backlog is long."""
    walk, marker = message["walk"], message.get("marker")
    youngest = clock.now() - timedelta(seconds=message.get("min_age_seconds", MIN_AGE_SECONDS))
    model_is_live = state.champion() is not None
    room = inbox.MAX_BACKLOG - inbox.backlog()
    while room > 0 and context.get_remaining_time_in_millis() > MIN_TIME_MS:
        start = marker
        found, marker = page(start)
        lost = lost_among([one for one in found if one.written <= youngest], model_is_live)
        if lost:  # what was written anew, and answered, between the listing and the reading of its row is not
            newest = {one.key: one.version_id for one in page(start)[0]}
            lost = [event for event in lost if newest.get(event.key, event.version_id) == event.version_id]
        inbox.send(inbox.queue_url(), [event.to_body() for event in lost])
        if lost:
            logger.warning("lost pictures were enqueued", extra={"count": len(lost), "first": lost[0].key})
        metrics.add_metric("Reconciled", MetricUnit.Count, len(lost))
        if not state.advance_walk(walk, seen=len(found), enqueued=len(lost), ended=marker is None):
            logger.info("another walk has taken over")
            return
        if marker is None:
            return
        room -= len(lost)
    if state.advance_walk(walk):
        aws.client("sqs").send_message(
            QueueUrl=os.environ["RECONCILE_QUEUE_URL"],
            MessageBody=json.dumps(message | {"marker": marker}),
            DelaySeconds=WAIT_SECONDS if room <= 0 else 0,
        )


def page(marker: Marker | None) -> tuple[list[Found], Marker | None]:
    """The newest version of each key on the page of the listing after `marker`, and where the next one begins, if any.

    What is listed first of a key is its newest. A page ends only where that of its last key has been seen.
    """
    found: dict[str, Found] = {}
    seen = marker["KeyMarker"] if marker else None
    while True:
        answer = aws.client("s3").list_object_versions(
            Bucket=os.environ["DATA_BUCKET"], Prefix=inbox.FOLDER, MaxKeys=PAGE, **(marker or {})
        )
        for one in answer.get("Versions", []):
            if one["Key"] not in found and one["Key"] != seen:
                deleted = not one["IsLatest"]
                found[one["Key"]] = Found(one["Key"], one["VersionId"], one["Size"], one["LastModified"], deleted)
        if not answer["IsTruncated"]:
            return list(found.values()), None
        marker = {"KeyMarker": answer["NextKeyMarker"]}
        if answer.get("NextVersionIdMarker"):
            marker["VersionIdMarker"] = answer["NextVersionIdMarker"]
        if marker["KeyMarker"] in found or marker["KeyMarker"] == seen:
            return list(found.values()), marker


def lost_among(found: list[Found], model_is_live: bool) -> list[ObjectEvent]:
    """The messages of those that have no row, or one that speaks of an older version, or that waits for nothing.

    A deleted picture needs no row; whoever wanted to be rid of it may have removed that too.
    """
    events = [event_of(one, sequencer.NONE) for one in found]
    present = [one for one, event in zip(found, events, strict=True) if not event.is_folder_marker]
    events = [event for event in events if not event.is_folder_marker]
    chunks = [events[start : start + MAX_KEYS] for start in range(0, len(events), MAX_KEYS)]
    rows: dict[str, predictions.Row | None] = {}
    with ThreadPoolExecutor(max_workers=4) as pool:
        for some in pool.map(predictions.current_rows, chunks):
            rows.update(some)
    lost = []
    for one, event in zip(present, events, strict=True):
        if event.image not in rows:  # DynamoDB did not get to it; the next walk will
            continue
        row = rows[event.image]
        if row is None:
            if not one.deleted:
                lost.append(event_of(one, sequencer.after(sequencer.NONE, one.written)))
        elif row["version_id"] != one.version_id:
            lost.append(event_of(one, sequencer.after(row["sequencer"], one.written)))
        elif row["status"] == "WAITING" and model_is_live:
            lost.append(event_of(one, row["sequencer"]))
    return lost


def event_of(one: Found, place: str) -> ObjectEvent:
    return ObjectEvent(
        bucket=os.environ["DATA_BUCKET"], key=one.key, version_id=one.version_id, sequencer=place, size=one.size
    )
