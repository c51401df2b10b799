"""Sends pictures through the inbox again: those that waited for a model, oldest first, a page an invocation.

Called by the workflow in a loop: `{"status": "WAITING"}`, and then with the `next` of the answer, until that is null.
"""

import os
from typing import Any

from aws_lambda_powertools import Logger, Tracer
from aws_lambda_powertools.utilities.typing import LambdaContext
from boto3.dynamodb.conditions import Key

from common import aws, clock, predictions, state
from common.events import ObjectEvent

logger = Logger()
tracer = Tracer()

PAGE = 500
MAX_BATCH = 10  # SendMessageBatch


class SendFailed(RuntimeError):
    """SQS refused some of the messages for now."""


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    status = event.get("status", "WAITING")
    position = event.get("next") or {"day": state.first_waiting_day(), "key": None}
    sent = event.get("sent", 0)
    if position["day"] is None:
        return {"status": status, "sent": 0, "next": None}
    rows, key = page(status, position["day"], position["key"])
    after = following(position["day"], key)
    while after and not rows:  # days on which nothing waited cost no invocation of their own
        rows, key = page(status, after["day"], after["key"])
        after = following(after["day"], key)
    send([replayed(row) for row in rows])
    return {"status": status, "sent": sent + len(rows), "next": after}


def page(status: str, day: str, key: dict[str, Any] | None) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Up to PAGE current rows of `status` on `day`, oldest first, and the key to go on from."""
    start = {"ExclusiveStartKey": key} if key else {}
    answer = predictions.table().query(
        IndexName="by-status", KeyConditionExpression=Key("status_day").eq(f"{status}#{day}"), Limit=PAGE, **start
    )
    return answer["Items"], answer.get("LastEvaluatedKey")


def following(day: str, key: dict[str, Any] | None) -> dict[str, Any] | None:
    """Where the next invocation goes on: the same day, the day after, or nowhere."""
    if key:
        return {"day": day, "key": key}
    later = clock.days(day, clock.now().date())[1:]
    return {"day": later[0], "key": None} if later else None


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


def send(bodies: list[str]) -> None:
    for start in range(0, len(bodies), MAX_BATCH):
        entries = [{"Id": str(i), "MessageBody": body} for i, body in enumerate(bodies[start : start + MAX_BATCH])]
        answer = aws.client("sqs").send_message_batch(QueueUrl=os.environ["INBOX_QUEUE_URL"], Entries=entries)
        if answer.get("Failed"):
            raise SendFailed(f"{len(answer['Failed'])} messages: {answer['Failed'][0].get('Message', '')}")
