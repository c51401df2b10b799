"""What was acknowledged: one record per resource, by account and region, each a JSON file that is replaced whole.

A record has the members of the resource's Describe answer, and private ones that start with an underscore.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import events, host
from .errors import SageMakerError, ValidationException

logger = logging.getLogger(__name__)
Record = dict[str, Any]
PAGE = 10  # records of a list, if MaxResults does not say


def now() -> float:
    """Seconds since the epoch, to the millisecond, as the JSON protocol carries time."""
    return round(time.time(), 3)


def arn(resource_type: str, name: str) -> str:
    """The ARN of a resource of the calling account and region; SageMaker writes names in lower case there."""
    return f"arn:aws:sagemaker:{host.region()}:{host.account()}:{resource_type}/{name.lower()}"


class Store:
    """Records by kind (`training-job`, `endpoint`, …) and name, within the calling account and region."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.frozen = False  # set when everything is being stopped: what ends by that is not written down as its end
        self._records: dict[tuple[str, str, str], dict[str, Record]] = {}
        for partial in folder.glob("*/*/*/*.partial"):  # of writes that were never acknowledged
            partial.unlink()
        for path in sorted(folder.glob("*/*/*/*.json")):
            account, region, kind = path.parts[-4:-1]
            try:
                record = json.loads(path.read_bytes())
                self._records.setdefault((account, region, kind), {})[record["_name"]] = record
            except (KeyError, TypeError, ValueError):  # not ours to lose: it stays for whoever looks into it
                logger.exception("%s cannot be read and is set aside", path)
                os.replace(path, path.with_suffix(".unreadable"))

    def scopes(self) -> set[tuple[str, str]]:
        """The (account, region) pairs that hold anything."""
        return {(account, region) for account, region, _ in self._records}

    def _kind(self, kind: str) -> dict[str, Record]:
        return self._records.setdefault((host.account(), host.region(), kind), {})

    def find(self, kind: str, name: str) -> Record | None:
        """The record, or None."""
        return self._kind(kind).get(name)

    def get(self, kind: str, name: str, missing: Callable[[], SageMakerError]) -> Record:
        """The record; raises `missing()` when there is none."""
        record = self.find(kind, name)
        if record is None:
            raise missing()
        return record

    def all(self, kind: str) -> Iterator[Record]:
        """Every record of a kind."""
        return iter(list(self._kind(kind).values()))

    def by_arn(self, resource_arn: str) -> Record | None:
        """The record of any kind with this ARN in the calling account and region."""
        for (account, region, _), records in self._records.items():
            if (account, region) == (host.account(), host.region()):
                for record in records.values():
                    if record["_arn"] == resource_arn:
                        return record
        return None

    def save(self, record: Record) -> None:
        """Puts the record on disk, whole or not at all, and into memory."""
        if self.frozen:
            return
        changes = events.due(record)
        path = self._path(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        os.replace(partial, path)
        self._kind(record["_kind"])[record["_name"]] = record  # last: what failed above is not acknowledged
        events.send(record, changes)

    def delete(self, record: Record) -> None:
        """Forgets the record."""
        if self.frozen:
            return
        self._path(record).unlink(missing_ok=True)
        self._kind(record["_kind"]).pop(record["_name"], None)
        events.send(record, events.deleted(record))

    def _path(self, record: Record) -> Path:
        # An ARN may hold a slash (a model package's version); a file name may not.
        name = record["_name"].replace("/", "@")
        return self.folder / host.account() / host.region() / record["_kind"] / f"{name}.json"


def record(kind: str, name: str, resource_arn: str, **members: Any) -> Record:
    """A new record with its identity; members that are None are left out."""
    identity = {"_kind": kind, "_name": name, "_arn": resource_arn}
    return identity | {key: value for key, value in members.items() if value is not None}


def page(
    records: Iterable[Record],
    request: dict,
    name: str,
    status: str = "",
    default_sort: str = "CreationTime",
    default_order: str = "Ascending",
) -> tuple[list[Record], str | None]:
    """Applies the filters, order and paging that SageMaker's List actions share.

    `name` and `status` are the members that hold them; `default_sort` (a value of SortBy, or a member) and
    `default_order` are what the documentation gives for the action. Returns (records of this page, next token or None).
    A token names the last record shown, so that what is made or deleted between two pages moves no other into both.
    """
    found = list(records)
    if wanted := request.get("NameContains"):
        found = [r for r in found if wanted.lower() in r[name].lower()]
    if status and (state := request.get("StatusEquals")):
        found = [r for r in found if r[status] == state]
    for moment in ("CreationTime", "LastModifiedTime"):
        if (after := request.get(f"{moment}After")) is not None:
            found = [r for r in found if r[moment] >= after]
        if (before := request.get(f"{moment}Before")) is not None:
            found = [r for r in found if r[moment] < before]
    sort, order = request.get("SortBy", default_sort), request.get("SortOrder", default_order)
    member = {"Name": name, "Status": status}.get(sort, sort)

    def place(r: Record) -> list:
        # Creation times may be equal, and the versions of a model package share their name.
        return [r.get(member, ""), r["CreationTime"], r[name], r.get("_name", "")]

    descending = order == "Descending"
    found.sort(key=place, reverse=descending)
    if token := request.get("NextToken"):
        try:
            last = _last_shown(token, sort, order)
            found = [r for r in found if (place(r) < last if descending else place(r) > last)]
        except (ValueError, TypeError):
            # Braces and all, as AWS says it.
            raise ValidationException('Invalid pagination token because "{0}".') from None
    limit = request.get("MaxResults", PAGE)
    shown = found[:limit]
    more = json.dumps([sort, order, place(shown[-1])]) if len(found) > limit else ""
    return shown, base64.urlsafe_b64encode(more.encode()).decode() or None


def _last_shown(token: str, sort: str, order: str) -> list:
    """Where the last page ended, from its token; raises ValueError or TypeError for one of another action or order."""
    given_sort, given_order, last = json.loads(base64.urlsafe_b64decode(token.encode()))
    if (given_sort, given_order) != (sort, order):
        raise ValueError(token)
    return last


def pick(source: dict, *names: str) -> dict:
    """The named members of a dict that are there."""
    return {name: source[name] for name in names if name in source}
