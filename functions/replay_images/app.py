"""Sends pictures through the inbox again, oldest first, a page an invocation.

After a promotion the workflow replays what waited: `{"status": "WAITING"}`. `tools/inbox.py replay` does the same for
what the old model was unsure of, `{"review": true}`, least confident first, and for a status or a class, by day:
`{"status": "FAILED", "from": "2026-11-20", "to": "2026-11-22"}`, `{"class": "beagle", "from": "2026-11-22"}`.

Called in a loop: the answer is the next call, until its `next` is null. A replayed picture gets a new row, on this day,
so only rows written before the first call are taken: no replay meets its own answers.
"""

import json
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext
from boto3.dynamodb.conditions import Attr, Key

from common import clock, inbox, predictions, state
from common.events import ObjectEvent
from common.inbox import SendFailed
from common.tracing import tracer

__all__ = ["SendFailed", "handler"]

logger = Logger()

PAGE = 500


class BadSelection(ValueError):
    """The event does not say which pictures."""


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    asked = event | {"before": event.get("before") or clock.iso(clock.now())}
    position = event.get("next") or {"day": first_day(event), "key": None}
    if position["day"] is None and not event.get("review"):
        return asked | {"sent": 0, "next": None}  # nothing ever waited
    rows: list[dict[str, Any]] = []
    after: dict[str, Any] | None = position
    while after and not rows:  # days on which there is nothing cost no invocation of their own
        rows, key = page(asked, after["day"], after["key"])
        after = following(asked, after["day"], key)
    inbox.send(inbox.queue_url(), [replayed(row) for row in rows])
    return asked | {"sent": event.get("sent", 0) + len(rows), "next": after}


def first_day(event: dict[str, Any]) -> str | None:
    """Where the replay begins; None without a day: for what awaits review, and where nothing ever waited."""
    if sum(name in event for name in ("status", "class", "review")) != 1:
        raise BadSelection("say one of status, class and review")
    if event.get("review"):
        return None
    if day := event.get("from"):
        return date.fromisoformat(day).isoformat()
    if event.get("status") != "WAITING":
        raise BadSelection("say from which day on, as in 2026-11-22")
    return state.first_waiting_day()


def page(
    asked: dict[str, Any], day: str | None, key: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Up to PAGE current rows of one partition of an index, in its order, and the key to go on from."""
    query: dict[str, Any] = {"Limit": PAGE}
    written_before = Key("updated_at").lt(asked["before"])
    if asked.get("review"):
        query |= {"IndexName": "for-review", "KeyConditionExpression": Key("review").eq("review")}
        query["FilterExpression"] = Attr("updated_at").lt(asked["before"])
    elif "class" in asked:
        partition = Key("class_day").eq(f"{asked['class']}#{day}")
        query |= {"IndexName": "by-class", "KeyConditionExpression": partition & written_before}
    else:
        partition = Key("status_day").eq(f"{asked['status']}#{day}")
        query |= {"IndexName": "by-status", "KeyConditionExpression": partition & written_before}
    if key:
        numbers = {"confidence": Decimal(key["confidence"])} if "confidence" in key else {}
        query["ExclusiveStartKey"] = key | numbers
    answer = predictions.table().query(**query)
    last = answer.get("LastEvaluatedKey")
    return answer["Items"], json.loads(json.dumps(last, default=str)) if last else None


def following(asked: dict[str, Any], day: str | None, key: dict[str, Any] | None) -> dict[str, Any] | None:
    """Where the next invocation goes on: on the same day, the day after, or nowhere."""
    if key:
        return {"day": day, "key": key}
    if day is None:
        return None
    last = min(asked.get("to") or asked["before"][:10], asked["before"][:10])
    later = (date.fromisoformat(day) + timedelta(days=1)).isoformat()
    return {"day": later, "key": None} if later <= last else None


def replayed(row: dict[str, Any]) -> str:
    """The message that makes classify_images look at the picture of `row` again."""
    return ObjectEvent(
        bucket=row["bucket"],
        key=row["key"],
        version_id=row["version_id"],
        sequencer=row["sequencer"],
        size=int(row["size"]),
        replayed=True,
    ).to_body()
