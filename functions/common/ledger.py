"""The Labels table: one item per labelled object, the groups of look-alikes, and the ledger that counts changes.

The split of a picture belongs to its group of look-alikes (pictures with the same difference hash), is dealt out when
the group is first seen, and never changes: no picture moves from training to test between two models.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from common import aws, clock
from common.events import ObjectEvent

Item = dict[str, Any]

LABELLED = "labelled/"
# Groups of one class are dealt to the splits in this order, over and over: 60 % train, 20 % validation, 20 % test,
# and a class of five pictures has some of each.
DEAL = ("train", "test", "validation", "train", "train", "train", "test", "validation", "train", "train")
CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.\-]{0,62}")

CHANGED = "SET changed_at = :now, waiting_since = if_not_exists(waiting_since, :now) ADD revision :one"


class BadLabel(ValueError):
    """An object under labelled/ that says no usable class; the text says why."""


@dataclass(frozen=True)
class Ledger:
    """How often the labels changed so far, when last, and since when changes wait for somebody to look at them."""

    revision: int
    changed_at: str
    waiting_since: str | None = None


def table() -> Any:
    return aws.table("LABELS_TABLE")


def class_of(key: str) -> str:
    """The class that a key under labelled/ names; raises BadLabel."""
    name, slash, rest = key.removeprefix(LABELLED).partition("/")
    if not slash or not rest:
        raise BadLabel(f"{key} is in no class folder; put it under {LABELLED}<class>/")
    if not CLASS_NAME.fullmatch(name):
        raise BadLabel(
            f"{name!r} is no class name: use up to 63 letters, digits, spaces, '_', '-', '.', first a letter or digit"
        )
    return name


def split_of(class_name: str, phash: str) -> str:
    """The split of the group of look-alikes `phash`; deals one to a group that is new."""
    key = {"pk": f"group#{phash}"}
    known = table().get_item(Key=key, ConsistentRead=True).get("Item")
    if known:
        return known["split"]
    dealt = table().update_item(
        Key={"pk": f"class#{class_name}"},
        UpdateExpression="ADD #groups :one",
        ExpressionAttributeNames={"#groups": "groups"},
        ExpressionAttributeValues={":one": 1},
        ReturnValues="UPDATED_NEW",
    )
    split = DEAL[(int(dealt["Attributes"]["groups"]) - 1) % len(DEAL)]
    try:
        table().put_item(Item=key | {"split": split}, ConditionExpression="attribute_not_exists(pk)")
    except ClientError as error:
        if not aws.is_conditional(error):
            raise
        return table().get_item(Key=key, ConsistentRead=True)["Item"]["split"]
    return split


def record(event: ObjectEvent, **attributes: Any) -> bool:
    """Write what `event` says of a label and count the change, unless a newer event was recorded; says whether it did.

    One transaction, so that a label never changes without the ledger knowing, whatever dies in between.
    """
    now = clock.iso(clock.now())
    item = {
        "pk": f"label#{event.image}",
        "bucket": event.bucket,
        "key": event.key,
        "version_id": event.version_id,
        "sequencer": event.sequencer,
        "registered_at": now,
    } | attributes
    for attempt in range(8):
        try:
            table().meta.client.transact_write_items(
                TransactItems=[
                    {
                        "Put": {
                            "TableName": table().name,
                            "Item": item,
                            "ConditionExpression": "attribute_not_exists(pk) OR sequencer < :sequencer",
                            "ExpressionAttributeValues": {":sequencer": event.sequencer},
                        }
                    },
                    {
                        "Update": {
                            "TableName": table().name,
                            "Key": {"pk": "ledger"},
                            "UpdateExpression": CHANGED,
                            "ExpressionAttributeValues": {":now": now, ":one": 1},
                        }
                    },
                ]
            )
            return True
        except ClientError as error:
            reasons = [r.get("Code") for r in error.response.get("CancellationReasons", [])]
            if reasons and reasons[0] == "ConditionalCheckFailed":
                return False
            # Every label touches the one ledger item; two at once collide, and the loser tries again.
            if "TransactionConflict" not in reasons or attempt == 7:
                raise
            time.sleep(0.02 * 2**attempt)
    raise AssertionError("unreachable")


def is_recorded(event: ObjectEvent) -> bool:
    """True when `event` says nothing new: it or a newer one was recorded, or it erased a version that is not the label.

    Old versions are erased by the bucket's lifecycle, long after a newer one took their place.
    """
    item = table().get_item(Key={"pk": f"label#{event.image}"}, ConsistentRead=True).get("Item")
    if event.erased and (not item or item["version_id"] != event.version_id):
        return True
    return bool(item) and item["sequencer"] >= event.sequencer


def read() -> Ledger | None:
    """Where the ledger stands, or None before the first label."""
    item = table().get_item(Key={"pk": "ledger"}, ConsistentRead=True).get("Item")
    return Ledger(int(item["revision"]), item["changed_at"], item.get("waiting_since")) if item else None


def settle(revision: int, at: str) -> None:
    """Note that the labels up to `revision`, as they were at the time `at`, wait no longer.

    They are in a snapshot, or were found too few for one. What changed meanwhile waits, since `at`: that is before it
    changed, for which reason `at` is a time before the labels were read.
    """
    try:
        table().update_item(
            Key={"pk": "ledger"},
            UpdateExpression="REMOVE waiting_since",
            ConditionExpression="revision = :revision",
            ExpressionAttributeValues={":revision": revision},
        )
    except ClientError as error:
        if not aws.is_conditional(error):
            raise
        table().update_item(
            Key={"pk": "ledger"},
            UpdateExpression="SET waiting_since = :at",
            ExpressionAttributeValues={":at": at},
        )


def active_labels() -> Iterator[Item]:
    """Every label that counts: `bucket, key, class, sha256, phash, split, registered_at`."""
    pages = (
        table()
        .meta.client.get_paginator("scan")
        .paginate(
            TableName=table().name,
            FilterExpression="begins_with(pk, :label) AND #status = :active",
            ExpressionAttributeNames={"#status": "status"},
            ExpressionAttributeValues={":label": "label#", ":active": "ACTIVE"},
            ConsistentRead=True,
        )
    )
    for page in pages:
        yield from page["Items"]
