"""The LoopState table: the lock, the champion, the history of deployments, the datasets that were trained."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

from common import aws, clock

Item = dict[str, Any]


def table() -> Any:
    return aws.table("LOOP_STATE_TABLE")


def get(pk: str, sk: str) -> Item | None:
    return table().get_item(Key={"pk": pk, "sk": sk}, ConsistentRead=True).get("Item")


def champion() -> Item | None:
    """The deployment that answers now, or None before the first."""
    return get("champion", "champion")


def put(pk: str, sk: str, attributes: Item) -> None:
    """Write an item, over the one that is there."""
    table().put_item(Item={"pk": pk, "sk": sk} | attributes)


def free_lock(holder: str) -> bool:
    """Free the lock if `holder` has it; says whether it had."""
    return aws.holds(
        table().delete_item,
        Key={"pk": "lock", "sk": "lock"},
        ConditionExpression="holder = :holder",
        ExpressionAttributeValues={":holder": holder},
    )


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


# A walk of reconcile_inbox that has not been heard of for so long died with its message; the next one takes its place.
WALK_IS_STALE = timedelta(hours=1)
_WALK = {"pk": "reconcile", "sk": "walk"}


def begin_walk(walk: str, started_by: str) -> bool:
    """Note that the walk through the inbox begins, once more if it did; says no while another is on its way."""
    now = clock.now()
    return aws.holds(
        table().put_item,
        Item=_WALK
        | {"walk": walk, "started_by": started_by, "seen": 0, "enqueued": 0}
        | {"started_at": clock.iso(now), "updated_at": clock.iso(now)},
        ConditionExpression=(
            "attribute_not_exists(pk) OR attribute_exists(ended_at) OR updated_at < :stale OR walk = :walk"
        ),
        ExpressionAttributeValues={":stale": clock.iso(now - WALK_IS_STALE), ":walk": walk},
    )


def advance_walk(walk: str, *, seen: int = 0, enqueued: int = 0, ended: bool = False) -> bool:
    """Count what the walk saw and enqueued; says no when another has taken its place."""
    now = clock.iso(clock.now())
    end = ", ended_at = :now" if ended else ""
    return aws.holds(
        table().update_item,
        Key=_WALK,
        UpdateExpression=f"SET updated_at = :now{end} ADD seen :seen, enqueued :sent",
        ConditionExpression="walk = :walk AND attribute_not_exists(ended_at)",
        ExpressionAttributeValues={":now": now, ":seen": seen, ":sent": enqueued, ":walk": walk},
    )


def number(value: float) -> Decimal:
    """A float as DynamoDB takes it, to six decimals."""
    return Decimal(str(round(value, 6)))
