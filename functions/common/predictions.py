"""The Predictions table: the schema of a row, and the conditional writes that keep it true.

One `current` row per picture always speaks of its newest version; every answer is kept beside it as history.
"""

import os
from typing import Any, Literal

from botocore.exceptions import ClientError

from common import aws, clock, state
from common.events import ObjectEvent

Status = Literal["CLASSIFIED", "WAITING", "REJECTED", "FAILED"]
Row = dict[str, Any]

CURRENT = "current"
# The newest version wins; of two answers about one version, the later deployment's.
NEWER = "attribute_not_exists(image) OR sequencer < :sequencer"
ANSWERS = f"{NEWER} OR (sequencer = :sequencer AND (attribute_not_exists(deployment) OR deployment <= :deployment))"
# "Not yet" and "not this time" never hide an answer.
NO_ANSWER = f"{NEWER} OR (sequencer = :sequencer AND #status IN (:waiting, :failed))"


def table() -> Any:
    return aws.table("PREDICTIONS_TABLE")


def review_threshold() -> float:
    return float(os.environ["REVIEW_THRESHOLD"])


def current_rows(events: list[ObjectEvent]) -> dict[str, Row]:
    """The current rows of the pictures that have one, by picture. At most 100 events (BatchGetItem's limit)."""
    wanted = {event.image for event in events}
    keys = [{"image": image, "version": CURRENT} for image in sorted(wanted)]
    rows: dict[str, Row] = {}
    while keys:
        request = {table().name: {"Keys": keys, "ConsistentRead": True}}
        answer = table().meta.client.batch_get_item(RequestItems=request)
        rows.update({row["image"]: row for row in answer["Responses"].get(table().name, [])})
        keys = answer.get("UnprocessedKeys", {}).get(table().name, {}).get("Keys", [])
    return rows


def is_settled(event: ObjectEvent, row: Row | None) -> bool:
    """True when `event` has nothing to add: it is older than the row, or a repetition of what was answered."""
    if row is None or row["sequencer"] < event.sequencer:
        return False
    if row["sequencer"] > event.sequencer:
        return True
    return row["status"] in ("CLASSIFIED", "REJECTED") and not event.replayed


def classified(
    event: ObjectEvent,
    classes: list[dict[str, Any]],
    *,
    model_version: str,
    deployment: int,
    dataset_hash: str,
    size: tuple[int, int],
    image_format: str,
    latency_ms: float,
) -> None:
    """Record an answer: `classes` are the top 5 as the endpoint gave them, best first."""
    best = classes[0]
    row = _row(event, "CLASSIFIED") | {
        "label": best["class"],
        "confidence": state.number(best["probability"]),
        "classes": [{"class": c["class"], "probability": state.number(c["probability"])} for c in classes],
        "model_version": model_version,
        "deployment": deployment,
        "dataset_hash": dataset_hash,
        "width": size[0],
        "height": size[1],
        "format": image_format,
        "latency_ms": state.number(latency_ms),
    }
    history = row | {"version": f"{event.sequencer}#{deployment:06d}#{model_version}"}
    _put(history, "attribute_not_exists(image)", {})
    row["class_day"] = f"{best['class']}#{_day(row)}"
    if best["probability"] < review_threshold():
        row["review"] = "review"
    _put(_current(row), ANSWERS, {":deployment": deployment})


def rejected(event: ObjectEvent, reason: str) -> bool:
    """Record that the file can never be classified; says whether that is news."""
    return _put(_current(_row(event, "REJECTED") | {"reason": reason}), NO_ANSWER, _no_answer_values(), _STATUS_NAME)


def waiting(event: ObjectEvent) -> bool:
    """Record that no model is live yet."""
    row = _current(_row(event, "WAITING"))
    state.remember_waiting_day(_day(row))
    return _put(row, NO_ANSWER, _no_answer_values(), _STATUS_NAME)


def failed(event: ObjectEvent, reason: str) -> bool:
    """Record trouble that outlasted the retries; the message goes to the dead-letter queue."""
    return _put(_current(_row(event, "FAILED") | {"reason": reason}), NO_ANSWER, _no_answer_values(), _STATUS_NAME)


_STATUS_NAME = {"#status": "status"}


def _no_answer_values() -> dict[str, str]:
    return {":waiting": "WAITING", ":failed": "FAILED"}


def _row(event: ObjectEvent, status: Status) -> Row:
    now = clock.iso(clock.now())
    return {
        "image": event.image,
        "version": CURRENT,
        "bucket": event.bucket,
        "key": event.key,
        "version_id": event.version_id,
        "sequencer": event.sequencer,
        "size": event.size,
        "status": status,
        "updated_at": now,
    }


def _current(row: Row) -> Row:
    return row | {"status_day": f"{row['status']}#{_day(row)}"}


def _day(row: Row) -> str:
    return row["updated_at"][:10]


def _put(row: Row, condition: str, values: dict[str, Any], names: dict[str, str] | None = None) -> bool:
    if ":sequencer" in condition:
        values = values | {":sequencer": row["sequencer"]}
    extra: dict[str, Any] = {"ExpressionAttributeValues": values} if values else {}
    if names:
        extra["ExpressionAttributeNames"] = names
    try:
        table().put_item(Item=row, ConditionExpression=condition, **extra)
    except ClientError as error:
        if aws.is_conditional(error):
            return False
        raise
    return True
