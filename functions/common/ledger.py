"""The Labels table: labelled objects, label files and what they say, the splits that were dealt, and the ledger item
that counts changes.

A file of labels is one `source` item and a `part` item for every few of its lines. Parts count only while they are of
the source's `reading` (the sequencer of the event it began with), so that one write replaces or withdraws all that a
file said.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from botocore.exceptions import ClientError

from common import aws, clock
from common.events import ObjectEvent
from common.names import BadLabel, class_name, fold
from common.objects import as_it_is_now
from common.splits import Splits

Item = dict[str, Any]

LABELLED = "labelled/"
CHANGED = "SET changed_at = :now, waiting_since = if_not_exists(waiting_since, :now) ADD revision :one"
HASHES_PER_ITEM = 3000  # of 32 digits and a split each: 150 kB of the 400 kB that an item may have
# What an assembly needs of the table, so that a scan of 100,000 labels stays small.
_ATTRIBUTES = (
    *("pk", "bucket", "key", "class", "sha256", "phash", "registered_at", "status"),
    *("sequencer", "source", "reading", "labels", "splits", "dealt"),
)


class LedgerMoved(RuntimeError):
    """Another writer was first, and what was decided rests on what was read before."""


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
    return class_name(name)


def get(event: ObjectEvent) -> Item | None:
    """What is recorded of a labelled object."""
    return _get(f"label#{event.image}")


def get_source(event: ObjectEvent) -> Item | None:
    """What is recorded of a label file."""
    return _get(f"source#{event.image}")


def news(event: ObjectEvent, known: Item | None) -> ObjectEvent | None:
    """What is to be recorded of an object of which `known` is recorded; None where the event says nothing new.

    A version that was deleted for good need not have been the newest, so then S3 is asked.
    """
    if event.is_folder_marker or (known and known["sequencer"] >= event.sequencer):
        return None
    if not event.erased:
        return event
    event = as_it_is_now(event)
    if known is None:
        return None if event.deleted else event
    if known["status"] == "DELETED" if event.deleted else known["version_id"] == event.version_id:
        _touch(known["pk"], event.sequencer)
        return None
    return event


def record(event: ObjectEvent, **attributes: Any) -> bool:
    """Write what `event` says of a label and count the change; says no if it or a newer event was recorded."""
    return _write_counted(_put("label", event, attributes))


def record_source(event: ObjectEvent, **attributes: Any) -> bool:
    """The same of a label file, of which a reading begins."""
    return _write_counted(_put("source", event, attributes | {"reading": event.sequencer}))


def _touch(pk: str, sequencer: str) -> None:
    """Note that an item, as it is, is true at a later event, too; nothing changed."""
    aws.holds(
        table().update_item,
        Key={"pk": pk},
        UpdateExpression="SET sequencer = :sequencer",
        ConditionExpression="sequencer < :sequencer",
        ExpressionAttributeValues={":sequencer": sequencer},
    )


def part_key(image: str, number: int) -> str:
    return f"part#{image}#{number:06d}"


def get_part(image: str, number: int) -> Item | None:
    return _get(part_key(image, number))


def record_part(image: str, reading: str, number: int, labels: list[Item], rejected: list[Item]) -> bool:
    """Write what a part of a label file says, count it as read and the change; no if that was done, or is outdated."""
    part = {"pk": part_key(image, number), "source": image, "sequencer": reading}
    return _write_counted(
        _newer(part | {"labels": labels, "rejected": rejected, "registered_at": clock.iso(clock.now())}),
        {
            "Update": {
                "TableName": table().name,
                "Key": {"pk": f"source#{image}"},
                "UpdateExpression": "ADD parts_read :one",
                "ConditionExpression": "reading = :reading",
                "ExpressionAttributeValues": {":one": 1, ":reading": reading},
            }
        },
    )


def parts(source: Item) -> Iterator[Item]:
    """All parts of a label file that were read so far in the reading that its source item is about."""
    keys = [{"pk": part_key(source["pk"].removeprefix("source#"), n)} for n in range(int(source.get("parts", 0)))]
    while keys:
        batch, keys = keys[:100], keys[100:]
        answer = table().meta.client.batch_get_item(
            RequestItems={table().name: {"Keys": batch, "ConsistentRead": True}}
        )
        yield from (p for p in answer["Responses"][table().name] if p["sequencer"] == source["reading"])
        keys += answer.get("UnprocessedKeys", {}).get(table().name, {}).get("Keys", [])


def end_source(source: Item, **attributes: Any) -> bool:
    """Note that a label file was read to its end; no if that was noted, or another version came meanwhile."""
    sets = ", ".join(f"#{name} = :{name}" for name in attributes)
    return aws.holds(
        table().update_item,
        Key={"pk": source["pk"]},
        UpdateExpression=f"SET #status = :read, {sets}",
        ConditionExpression="reading = :this AND #status = :reading",
        ExpressionAttributeNames={"#status": "status"} | {f"#{name}": name for name in attributes},
        ExpressionAttributeValues={":read": "READ", ":reading": "READING", ":this": source["reading"]}
        | {f":{name}": value for name, value in attributes.items()},
    )


@cache
def first_spelling(name: str) -> str:
    """How a class was spelled when it was first seen, `name` if that is now: good for a warning, decides nothing."""
    return table().update_item(
        Key={"pk": f"spelling#{fold(name)}"},
        UpdateExpression="SET spelling = if_not_exists(spelling, :name)",
        ExpressionAttributeValues={":name": name},
        ReturnValues="ALL_NEW",
    )["Attributes"]["spelling"]


def read() -> Ledger | None:
    """Where the ledger stands, or None before the first label."""
    item = _get("ledger")
    return Ledger(int(item["revision"]), item["changed_at"], item.get("waiting_since")) if item else None


def settle(revision: int, at: str) -> None:
    """Note that the labels up to `revision`, as they were at the time `at`, wait no longer.

    They are in a snapshot, or were found too few for one. What changed meanwhile waits, since `at`: that is before it
    changed, for which reason `at` is a time before the labels were read.
    """
    newest = aws.holds(
        _update_ledger,
        UpdateExpression="REMOVE waiting_since",
        ConditionExpression="revision = :revision",
        ExpressionAttributeValues={":revision": revision},
    )
    if not newest:
        aws.holds(
            _update_ledger,
            UpdateExpression="SET waiting_since = :at",
            ConditionExpression="attribute_exists(waiting_since)",  # else somebody settled the newer ones
            ExpressionAttributeValues={":at": at},
        )


def _update_ledger(**request: Any) -> None:
    """DynamoDB refuses a write of the ledger item while the transaction of a label is at it."""
    for attempt in range(8):
        try:
            table().update_item(Key={"pk": "ledger"}, **request)
            return
        except ClientError as error:
            if aws.code(error) != "TransactionConflictException" or attempt == 7:
                raise
            time.sleep(0.02 * 2**attempt)


@dataclass(frozen=True)
class Contents:
    """All that an assembly needs, from one scan."""

    labels: list[Item]
    """Every label that counts: `bucket, key, class, sha256, phash, registered_at`."""
    splits: Splits
    split_items: int


def contents() -> Contents:
    """The labels that count now, and the splits dealt so far."""
    labels: list[Item] = []
    found: list[Item] = []
    current: dict[str, str] = {}
    of: dict[str, str] = {}
    dealt: dict[str, int] = {}
    split_items = 0
    for item in _scan():
        kind, _, rest = item["pk"].partition("#")
        if kind == "label":
            labels.append(_label(item, item["registered_at"]))
        elif kind == "source":
            current[rest] = item["reading"]
        elif kind == "part":
            found.append(item)
        else:
            split_items += 1
            of |= item["splits"]
            for name, count in item["dealt"].items():
                dealt[name] = max(int(count), dealt.get(name, 0))
    for part in found:
        if current.get(part["source"]) == part["sequencer"]:
            bucket = part["source"].partition("/")[0]
            labels += [_label({"bucket": bucket} | each, part["registered_at"]) for each in part["labels"]]
    return Contents(labels, Splits(of, dealt), split_items)


def save_splits(new: Splits, after: int) -> None:
    """Keep splits that were dealt, behind the `after` items that were read; LedgerMoved if another did so first."""
    hashes = sorted(new.of.items())
    for number, first in enumerate(range(0, len(hashes), HASHES_PER_ITEM), after):
        page = {"pk": f"splits#{number:06d}", "splits": dict(hashes[first : first + HASHES_PER_ITEM])}
        item = page | {"dealt": new.dealt}
        if not aws.holds(table().put_item, Item=item, ConditionExpression="attribute_not_exists(pk)"):
            raise LedgerMoved(f"{page['pk']} was written by another")


def _label(item: Item, registered_at: str) -> Item:
    names = ("bucket", "key", "class", "sha256", "phash")
    return {name: item[name] for name in names} | {"registered_at": item.get("registered_at", registered_at)}


def _scan() -> Iterator[Item]:
    names = {f"#{name}": name for name in _ATTRIBUTES}
    pages = (
        table()
        .meta.client.get_paginator("scan")
        .paginate(
            TableName=table().name,
            ProjectionExpression=", ".join(names),
            FilterExpression="#status IN (:active, :reading, :read) "
            "OR begins_with(#pk, :part) OR begins_with(#pk, :splits)",
            ExpressionAttributeNames=names,
            ExpressionAttributeValues={
                **{":active": "ACTIVE", ":reading": "READING", ":read": "READ"},
                **{":part": "part#", ":splits": "splits#"},
            },
            ConsistentRead=True,
        )
    )
    for page in pages:
        yield from page["Items"]


def _get(pk: str) -> Item | None:
    return table().get_item(Key={"pk": pk}, ConsistentRead=True).get("Item")


def _put(kind: str, event: ObjectEvent, attributes: Item) -> Item:
    item = {
        "pk": f"{kind}#{event.image}",
        "bucket": event.bucket,
        "key": event.key,
        "version_id": event.version_id,
        "sequencer": event.sequencer,
        "registered_at": clock.iso(clock.now()),
    }
    return _newer(item | attributes)


def _newer(item: Item) -> Item:
    """The write of an item that gives way to a newer event's, and to its own repetition."""
    return {
        "Put": {
            "TableName": table().name,
            "Item": item,
            "ConditionExpression": "attribute_not_exists(pk) OR sequencer < :sequencer",
            "ExpressionAttributeValues": {":sequencer": item["sequencer"]},
        }
    }


def _write_counted(*writes: Item) -> bool:
    """Do conditional writes and count them as one change, all or none; no if a condition does not hold.

    One transaction, so that labels never change without the ledger knowing, whatever dies in between.
    """
    count = {
        "Update": {
            "TableName": table().name,
            "Key": {"pk": "ledger"},
            "UpdateExpression": CHANGED,
            "ExpressionAttributeValues": {":now": clock.iso(clock.now()), ":one": 1},
        }
    }
    for attempt in range(8):
        try:
            table().meta.client.transact_write_items(TransactItems=[*writes, count])
            return True
        except ClientError as error:
            reasons = [r.get("Code") for r in error.response.get("CancellationReasons", [])]
            if "ConditionalCheckFailed" in reasons:
                return False
            # Every label touches the one ledger item; two at once collide, and the loser tries again.
            if "TransactionConflict" not in reasons or attempt == 7:
                raise
            time.sleep(0.02 * 2**attempt)
    raise AssertionError("unreachable")
