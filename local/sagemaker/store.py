"""What was acknowledged: one record per resource, by account and region, each a JSON file that is replaced whole.

A record has the members of the resource's Describe answer, and private ones that start with an underscore.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import host
from .errors import SageMakerError, ValidationException

Record = dict[str, Any]


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
        for path in sorted(folder.glob("*/*/*/*.json")):
            record = json.loads(path.read_text())
            account, region, kind = path.parts[-4:-1]
            self._records.setdefault((account, region, kind), {})[record["_name"]] = record

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
        """Puts the record into memory and, whole or not at all, on disk."""
        if self.frozen:
            return
        self._kind(record["_kind"])[record["_name"]] = record
        path = self._path(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
        partial.write_text(json.dumps(record))
        os.replace(partial, path)

    def delete(self, record: Record) -> None:
        """Forgets the record."""
        if self.frozen:
            return
        self._kind(record["_kind"]).pop(record["_name"], None)
        self._path(record).unlink(missing_ok=True)

    def _path(self, record: Record) -> Path:
        # An ARN may hold a slash (a model package's version); a file name may not.
        name = record["_name"].replace("/", "@")
        return self.folder / host.account() / host.region() / record["_kind"] / f"{name}.json"


def record(kind: str, name: str, resource_arn: str, **members: Any) -> Record:
    """A new record with its identity; members that are None are left out."""
    identity = {"_kind": kind, "_name": name, "_arn": resource_arn}
    return identity | {key: value for key, value in members.items() if value is not None}


def page(
    records: Iterable[Record], request: dict, name: str, status: str = "", default_sort: str = "CreationTime"
) -> tuple[list[Record], str | None]:
    """Applies the filters, order and paging that SageMaker's List actions share.

    `name` and `status` are the members that hold them. Returns (records of this page, next token or None).
    """
    found = list(records)
    if wanted := request.get("NameContains"):
        found = [r for r in found if wanted.lower() in r[name].lower()]
    if status and (state := request.get("StatusEquals")):
        found = [r for r in found if r[status] == state]
    for member, parameter in (
        ("CreationTime", "CreationTime"),
        ("CreationTime", "Created"),
        ("LastModifiedTime", "LastModifiedTime"),
    ):
        if (after := request.get(f"{parameter}After")) is not None:
            found = [r for r in found if r[member] >= seconds(after)]
        if (before := request.get(f"{parameter}Before")) is not None:
            found = [r for r in found if r[member] <= seconds(before)]
    sort = {"Name": name, "Status": status}.get(request.get("SortBy", ""), request.get("SortBy") or default_sort)
    default_order = "Ascending" if request.get("SortBy") == "Name" else "Descending"
    found.sort(
        key=lambda r: (r.get(sort) or 0) if sort.endswith("Time") else str(r.get(sort, "")),
        reverse=request.get("SortOrder", default_order) == "Descending",
    )
    start = _offset(request.get("NextToken"))
    end = start + int(request.get("MaxResults", 10))
    token = base64.urlsafe_b64encode(str(end).encode()).decode() if end < len(found) else None
    return found[start:end], token


def seconds(moment: float | str) -> float:
    """A time of a request, seconds since the epoch or ISO 8601 text (Step Functions), as seconds."""
    if isinstance(moment, str):
        try:
            return datetime.datetime.fromisoformat(moment).timestamp()
        except ValueError:
            raise ValidationException(f"{moment!r} is not a time.") from None
    return float(moment)


def _offset(token: str | None) -> int:
    if token is None:
        return 0
    text = ""
    with contextlib.suppress(ValueError):
        text = base64.urlsafe_b64decode(token.encode()).decode()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValidationException("Invalid NextToken: it was not returned by this action.")
    return int(text)


def pick(source: dict, *names: str) -> dict:
    """The named members of a dict that are there."""
    return {name: source[name] for name in names if name in source}
