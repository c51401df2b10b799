"""The Predictions table: the schema of a row, and the conditional writes that keep it true.

One `current` row per picture always speaks of its newest version; every answer is kept beside it as history.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from boto3.dynamodb.types import TypeSerializer

from common import aws, clock, state
from common.events import ObjectEvent

Status = Literal["CLASSIFIED", "WAITING", "REJECTED", "FAILED"]
Row = dict[str, Any]

CURRENT = "current"
MAX_STATEMENTS = 25  # BatchExecuteStatement's limit
READ_ATTEMPTS = 4
# The newest version wins; of two answers about one version, the later deployment's. One that is shown already is not
# written again: whoever reviewed it may have taken its mark away.
NEWER = "attribute_not_exists(image) OR sequencer < :sequencer"
ANSWERS = f"{NEWER} OR (sequencer = :sequencer AND (attribute_not_exists(deployment) OR deployment < :deployment))"
# The champion's, when it is asked again, also replaces that of a later deployment, which was rolled back.
CHAMPIONS = ANSWERS.replace("deployment < ", "deployment <> ")
# "Not yet" and "not this time" never hide an answer.
NO_ANSWER = f"{NEWER} OR (sequencer = :sequencer AND #status IN (:waiting, :failed))"


_serializer = TypeSerializer()


class ReadFailed(RuntimeError):
    """DynamoDB did not get to a row for now."""


class WriteFailed(RuntimeError):
    """DynamoDB refused one write of a batch for now."""


def table() -> Any:
    return aws.table("PREDICTIONS_TABLE")


def review_threshold() -> float:
    return float(os.environ["REVIEW_THRESHOLD"])


def history_days() -> int:
    """How long history is kept; 0 for ever."""
    return int(os.environ["HISTORY_DAYS"])


def current_rows(events: list[ObjectEvent]) -> dict[str, Row | None]:
    """The current rows of the pictures, by picture: None for one that has none, and nothing where none could be read.

    At most 100 events (BatchGetItem's limit).
    """
    wanted = {event.image for event in events}
    keys = [{"image": image, "version": CURRENT} for image in sorted(wanted)]
    rows: dict[str, Row | None] = dict.fromkeys(wanted)
    for attempt in range(READ_ATTEMPTS):
        if not keys:
            return rows
        if attempt:
            time.sleep(random.uniform(0.5, 1) * 0.1 * 4**attempt)
        answer = table().meta.client.batch_get_item(RequestItems={table().name: {"Keys": keys, "ConsistentRead": True}})
        rows.update({row["image"]: row for row in answer["Responses"].get(table().name, [])})
        keys = answer.get("UnprocessedKeys", {}).get(table().name, {}).get("Keys", [])
    for key in keys:
        del rows[key["image"]]
    return rows


def is_settled(event: ObjectEvent, row: Row | None) -> bool:
    """True when `event` has nothing to add: it is older than the row, or a repetition of what was answered."""
    if row is None or row["sequencer"] < event.sequencer:
        return False
    if row["sequencer"] > event.sequencer:
        return True
    return row["status"] in ("CLASSIFIED", "REJECTED") and not event.replayed


@dataclass(frozen=True)
class Answer:
    """What the endpoint said about one version of a picture: `classes` are its top 5, best first."""

    event: ObjectEvent
    classes: list[dict[str, Any]]
    model_version: str
    deployment: int
    dataset_hash: str
    width: int
    height: int
    format: str
    latency_ms: float
    note: str | None = None
    by_champion: bool = False


def classified(answers: list[Answer]) -> list[Exception | None]:
    """Record answers, each as history and then as the current row; returns for each the error that it met, or None.

    An answer that is history stays: whoever comes again with the same version, deployment and model, because the
    first to do so died, or another got the same event, makes the row say what the history says.
    """
    kept = _insert([_history(answer) for answer in answers], _kept)
    rows = [_answered(item) for item in kept if not isinstance(item, Exception)]
    again = {answer.event.image for answer in answers if answer.by_champion and answer.event.replayed}
    shown = iter(_insert(rows, lambda row: _show(row, CHAMPIONS if row["image"] in again else ANSWERS)))
    found = [item if isinstance(item, Exception) else next(shown) for item in kept]
    return [item if isinstance(item, Exception) else None for item in found]


def rejected(event: ObjectEvent, reason: str) -> bool:
    """Record that the file can never be classified; says whether that is news."""
    return _put(_current(_row(event, "REJECTED") | {"reason": reason}), NO_ANSWER, _no_answer_values(), _STATUS_NAME)


def waiting(event: ObjectEvent, reason: str = "no model is live yet") -> bool:
    """Record that the picture is not classified yet, and why."""
    row = _current(_row(event, "WAITING") | {"reason": reason})
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


def _history(answer: Answer) -> Row:
    best = answer.classes[0]
    event = answer.event
    row = _row(event, "CLASSIFIED") | {
        "version": f"{event.sequencer}#{answer.deployment:06d}#{answer.model_version}",
        "label": best["class"],
        "confidence": state.number(best["probability"]),
        "classes": [{"class": c["class"], "probability": state.number(c["probability"])} for c in answer.classes],
        "model_version": answer.model_version,
        "deployment": answer.deployment,
        "dataset_hash": answer.dataset_hash,
        "width": answer.width,
        "height": answer.height,
        "format": answer.format,
        "latency_ms": state.number(answer.latency_ms),
    }
    if answer.note:
        row["note"] = answer.note
    if event.replayed:
        row["replayed"] = True
    if days := history_days():
        row["expires_at"] = int((clock.now() + timedelta(days=days)).timestamp())
    return row


def _answered(history: Row) -> Row:
    """The current row that says what an item of the history says."""
    row = {name: value for name, value in history.items() if name != "expires_at"} | {"version": CURRENT}
    row["class_day"] = f"{row['label']}#{_day(row)}"
    if row["confidence"] < review_threshold():
        row["review"] = "review"
    return _current(row)


def _kept(history: Row) -> Row:
    """The item of the history that is there already."""
    key = {"image": history["image"], "version": history["version"]}
    item = table().get_item(Key=key, ConsistentRead=True).get("Item")
    if item is None:
        raise WriteFailed("its history was there, and then was not")
    return item


def _show(row: Row, condition: str) -> Row:
    _put(row, condition, {":deployment": row["deployment"]})
    return row


def _insert(rows: list[Row], otherwise: Callable[[Row], Row]) -> list[Row | Exception]:
    """Write items whose keys are new, in one request; `otherwise` deals with each one whose key is taken.

    PartiQL's INSERT is the one conditional write that DynamoDB takes in batches.
    """
    found: list[Row | Exception] = list(rows)
    firsts: dict[tuple[str, str], int] = {}
    taken = [i for i, row in enumerate(rows) if firsts.setdefault((row["image"], row["version"]), i) != i]
    fresh = list(firsts.values())
    for start in range(0, len(fresh), MAX_STATEMENTS):
        part = fresh[start : start + MAX_STATEMENTS]
        try:
            answers = aws.client("dynamodb").batch_execute_statement(Statements=[_statement(rows[i]) for i in part])
        except Exception as error:
            for i in part:
                found[i] = error
            continue
        for i, answer in zip(part, answers["Responses"], strict=True):
            refused = answer.get("Error", {})
            if refused.get("Code") == "DuplicateItem":
                taken.append(i)
            elif refused:
                found[i] = WriteFailed(f"{refused.get('Code')}: {refused.get('Message', '')}")
    for i in taken:
        try:
            found[i] = otherwise(rows[i])
        except Exception as error:
            found[i] = error
    return found


def _statement(row: Row) -> dict[str, Any]:
    names = ", ".join(f"'{name}': ?" for name in row)
    return {
        "Statement": f'INSERT INTO "{table().name}" VALUE {{{names}}}',
        "Parameters": [_serializer.serialize(value) for value in row.values()],
    }


def _put(row: Row, condition: str, values: dict[str, Any], names: dict[str, str] | None = None) -> bool:
    if ":sequencer" in condition:
        values = values | {":sequencer": row["sequencer"]}
    extra: dict[str, Any] = {"ExpressionAttributeValues": values} if values else {}
    if names:
        extra["ExpressionAttributeNames"] = names
    return aws.holds(table().put_item, Item=row, ConditionExpression=condition, **extra)
