"""The LoopState table: the lock, the champion, the history of deployments, the datasets that were trained."""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from botocore.exceptions import ClientError

from common import aws

Item = dict[str, Any]


def table() -> Any:
    return aws.table("LOOP_STATE_TABLE")


def get(pk: str, sk: str) -> Item | None:
    return table().get_item(Key={"pk": pk, "sk": sk}, ConsistentRead=True).get("Item")


def champion() -> Item | None:
    """The deployment that answers now, or None before the first."""
    return get("champion", "champion")


def lock_holder() -> str | None:
    """The ARN of the execution that is retraining now."""
    item = get("lock", "lock")
    return item["holder"] if item else None


def lock_is_held(holder_runs: Callable[[str], bool]) -> str | None:
    """The execution that holds the lock, if it still runs; the lock of one that ended without freeing it is freed."""
    holder = lock_holder()
    if holder is None or holder_runs(holder):
        return holder
    free_lock(holder)
    return None


def free_lock(holder: str) -> bool:
    """Free the lock if `holder` has it; says whether it had."""
    try:
        table().delete_item(
            Key={"pk": "lock", "sk": "lock"},
            ConditionExpression="holder = :holder",
            ExpressionAttributeValues={":holder": holder},
        )
    except ClientError as error:
        if aws.is_conditional(error):
            return False
        raise
    return True


def remember_waiting_day(day: str) -> None:
    """Keep the first day on which a picture had to wait, from which a replay looks for them."""
    table().update_item(
        Key={"pk": "inbox", "sk": "first_waiting_day"},
        UpdateExpression="SET #day = if_not_exists(#day, :day)",
        ExpressionAttributeNames={"#day": "day"},
        ExpressionAttributeValues={":day": day},
    )


def first_waiting_day() -> str | None:
    item = get("inbox", "first_waiting_day")
    return item["day"] if item else None


def number(value: float) -> Decimal:
    """A float as DynamoDB takes it, to six decimals."""
    return Decimal(str(round(value, 6)))
