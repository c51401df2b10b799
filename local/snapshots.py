"""The state of the emulator's services on disk: one SQLite file that is brought up to date with what changed.

A service's state is a dict of stores, as ministack's `get_state` returns it. It is taken apart into nodes (a table, its
items, a queue, its messages) and each node into parts that are rows of the file. `Snapshots.changes` compares the
living state with what was written before and finds the parts that differ; `Snapshots.write` puts them down in one
transaction, so that whatever happens to the process, the file holds one state of each service, whole. Large bytes (the
parts of uploads) have files of their own beside it, named by their hash.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ministack.core.persistence import _json_default, _json_object_hook
from ministack.core.responses import AccountRegionScopedDict, AccountScopedDict

logger = logging.getLogger("houndloop.snapshots")

FORMAT = 1
CHUNK = 200  # values of a list in one row
BATCH = 1 << 22  # characters of rows in one statement, which take memory; SQLite takes no more than 10^9
LARGE = 1 << 16  # bytes that have a file of their own
FILE = "__file__"  # the mark of their names
SHELL = ""  # the part that holds what kind of container a node is
SCHEMA = """
    CREATE TABLE IF NOT EXISTS parts (
        service TEXT NOT NULL, node TEXT NOT NULL, part TEXT NOT NULL, value TEXT NOT NULL,
        PRIMARY KEY (service, node, part)
    )
"""
# Rows that name files, found without reading the others.
INDEX = "CREATE INDEX IF NOT EXISTS files ON parts (service) WHERE instr(value, '\"__file__\"')"
NAMED = "SELECT value FROM parts WHERE instr(value, '\"__file__\"')"
NAME = re.compile(r'"__file__": "([0-9a-f]{64})"')


def _rows(columns: int) -> str:
    return ", ".join(f"json_extract(value, '$[{column}]')" for column in range(columns)) + " FROM json_each(?)"


# One statement each, whatever the number of rows: after every step of SQLite this thread has to wait until the others
# let it run again. The rowid of a part stays when its value changes, so that parts are read in the order in which they
# were first seen.
UPSERT = f"""
    INSERT INTO parts SELECT {_rows(4)} WHERE true
    ON CONFLICT (service, node, part) DO UPDATE SET value = excluded.value
"""
DELETE = f"DELETE FROM parts WHERE (service, node, part) IN (SELECT {_rows(3)})"
MOVE = """
    UPDATE OR REPLACE parts
    SET node = replace(node, :old, :new), value = CASE part WHEN '' THEN replace(value, :old, :new) ELSE value END
    WHERE instr(node, :old) OR (part = '' AND instr(value, :old))
"""
DELETE_NODES = f"DELETE FROM parts WHERE (service, node) IN (SELECT {_rows(2)})"

encode_plain = json.JSONEncoder().encode
decode_plain = json.JSONDecoder().decode

Path_ = tuple[Any, ...]
Parts = dict[Any, Any]  # part of a node (a tuple, or SHELL): value


def copied(value: Any) -> Any:
    """A copy of nested dicts and lists that shares what cannot change: texts, numbers, bytes."""
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in list(value.items())}
    if isinstance(value, list):
        return [copied(entry) for entry in list(value)]
    if unscoped(value) is not value:
        copy = type(value)()
        copy._data.update(copied(value._data))
        return copy
    return value


def _inner(container: Any, steps: Path_) -> dict:
    """The dict at the end of `steps`, made if it is not there."""
    for step in steps:
        container = unscoped(container).setdefault(step, {})
    return unscoped(container)


def unscoped(value: Any) -> dict:
    """The plain dict in ministack's dicts by account and region."""
    return value._data if isinstance(value, (AccountRegionScopedDict, AccountScopedDict)) else value


class Whole:
    """A value in one part. What changes inside of it is seen too."""

    def changes(self, kept: Any, value: Any) -> tuple[Any, Parts, list] | None:
        """(what to compare with next time, parts to write, parts to delete), None if nothing changed.

        `kept` is what the last call returned first, None at the first.
        """
        if kept is not None and kept[0] == value:
            return None
        copy = copied(value)
        return (copy,), {SHELL: copy}, []


class Items:
    """A dict, or dicts in a dict (`depth`), whose innermost values are replaced and never changed: a part each."""

    def __init__(self, depth: int = 1) -> None:
        self.depth = depth

    def changes(self, kept: Any, value: Any) -> tuple[Any, Parts, list] | None:
        """See `Whole.changes`."""
        living = unscoped(value)
        if kept is not None and kept == living:
            return None
        write: Parts = {SHELL: type(value)() if living is not value else {}} if kept is None else {}
        delete: list = []
        known = kept or {}
        mirror = known
        if self.depth == 1:
            self._compare((), mirror, living, write, delete)
        else:
            for key in [key for key in known if key not in living]:
                delete += [(key, inner) for inner in mirror.pop(key)]
            for key, entries in list(living.items()):
                if known.get(key) != entries:
                    mirror.setdefault(key, {})
                    self._compare((key,), mirror[key], entries, write, delete)
        return mirror, write, delete

    @staticmethod
    def _compare(prefix: Path_, mirror: dict, living: dict, write: Parts, delete: list) -> None:
        for key in [key for key in mirror if key not in living]:
            del mirror[key]
            delete.append((*prefix, key))
        for key, value in list(living.items()):
            if key not in mirror or (mirror[key] is not value and mirror[key] != value):
                mirror[key] = write[*prefix, key] = value


class Growing:
    """A list whose values never change, most often appended to: a part for every `chunk` of them."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk

    def changes(self, kept: Any, value: Any) -> tuple[Any, Parts, list] | None:
        """See `Whole.changes`."""
        living = list(value)
        if kept is not None and kept == living:
            return None
        write: Parts = {SHELL: []} if kept is None else {}
        known = kept or []
        for start in range(0, len(living), self.chunk):
            if living[start : start + self.chunk] != known[start : start + self.chunk]:
                write[(start // self.chunk,)] = living[start : start + self.chunk]
        count, before = (-(-len(values) // self.chunk) for values in (living, known))
        return living, write, [(chunk,) for chunk in range(count, before)]


class Records:
    """A list of dicts, each with its own `id`, that change and come and go: a part each."""

    def changes(self, kept: Any, value: Any) -> tuple[Any, Parts, list] | None:
        """See `Whole.changes`."""
        write: Parts = {SHELL: []} if kept is None else {}
        known = kept or {}
        copies: dict[str, dict] = {}
        for record in list(value):
            name = str(record.get("id"))
            while name in copies:
                name += "+"
            same = known.get(name)
            if same != record:
                same = copied(record)
                write[(name,)] = [same]
            copies[name] = same
        delete = [(name,) for name in known if name not in copies]
        return (copies, write, delete) if write or delete else None


class Shells:
    """An empty container, for what is put into it by nodes of their own."""

    def changes(self, kept: Any, value: Any) -> tuple[Any, Parts, list] | None:
        """See `Whole.changes`."""
        return None if kept is not None else (True, {SHELL: value}, [])


Kind = Whole | Items | Growing | Records | Shells
WHOLE, SHELLS = Whole(), Shells()
# How to take an entry of a store apart: the kinds of those of its members that are nodes of their own. A member of
# members is written with a slash, `*` is any key.
Split = dict[str, Kind]


def nodes(state: dict, splits: dict[str, Split | Kind]) -> Iterator[tuple[Path_, Any, Kind]]:
    """The nodes of a service's state: (path, living value, kind), each after those that it is part of."""
    for store, value in state.items():
        split = splits.get(store, {})
        if not isinstance(split, dict):
            yield (store,), value, split
        elif unscoped(value) is value:
            yield (store,), value, WHOLE
        else:
            yield (store,), type(value)(), SHELLS
            for key, entry in list(unscoped(value).items()):
                yield from _entry((store, key), entry, split)


def _entry(path: Path_, entry: Any, split: Split) -> Iterator[tuple[Path_, Any, Kind]]:
    if "" in split:
        yield path, entry, split[""]
        return
    members = {name.split("/")[0] for name in split}
    if not members or not isinstance(entry, dict):
        yield path, entry, WHOLE
        return
    yield path, {key: value for key, value in list(entry.items()) if key not in members}, WHOLE
    for name, kind in split.items():
        member, _, rest = name.partition("/*/")
        if member in entry and not rest:
            yield (*path, member), entry[member], kind
        elif member in entry:
            yield (*path, member), {}, SHELLS
            for key, inner in list(entry[member].items()):
                yield from _entry((*path, member, key), inner, {rest: kind})


@dataclass
class Changes:
    """What differs from the file in one service: parts to write and to delete; `all` if it replaces what is there."""

    service: str
    all: bool
    write: list[tuple[Path_, Any, Any]] = field(default_factory=list)  # node, part, value
    delete: list[tuple[Path_, Any]] = field(default_factory=list)
    gone: list[Path_] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.all or self.write or self.delete or self.gone)


def batches(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """The rows as JSON, no more than about `BATCH` characters at a time."""
    start = size = 0
    for end, row in enumerate(rows, 1):
        size += sum(map(len, row))
        if size >= BATCH or end == len(rows):
            yield json.dumps(rows[start:end])
            start, size = end, 0


class Snapshots:
    """The file, and what is known to be in it. `endpoint` is the URL of the emulator, with a slash at its end."""

    def __init__(self, path: Path, endpoint: str = "") -> None:
        self.path, self.endpoint = path, endpoint
        self._kept: dict[str, dict[Path_, Any]] = {}
        self._unwritable: set[tuple[str, Path_]] = set()
        self._files = path.with_name("files")
        self._encode = json.JSONEncoder(default=self._marked).encode
        self._decode = json.JSONDecoder(object_hook=self._unmarked).decode
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # the disk is full, or the file in use: it is as it was
                raise
            aside = path.with_name(f"{path.name}.unreadable-{int(time.time())}")
            logger.error("%s cannot be read (%s): kept as %s, and begun anew", path, error, aside.name)
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{path}{suffix}", f"{aside}{suffix}")
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._files, f"{aside}-files")
            self._connection = self._open()
        self._move()
        self._remove_files()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")  # a lost machine may cost the last writes, never the file
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, FORMAT):
                raise sqlite3.DatabaseError(f"its format is {found}, not {FORMAT}")
            connection.execute(SCHEMA)
            connection.execute(INDEX)
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.execute("SELECT count(*) FROM parts").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def services(self) -> list[str]:
        """The services that the file has a state of."""
        names = self._connection.execute("SELECT DISTINCT service FROM parts WHERE service != ''")
        return sorted(name for (name,) in names)

    def _move(self) -> None:
        """Let URLs of the emulator itself, by which ministack knows queues, follow it to where it is now. In what is
        data (items, messages, events) they stay as they were."""
        found = self._connection.execute("SELECT value FROM parts WHERE service = ''").fetchone()
        if found == (self.endpoint,):
            return
        with self._transaction() as connection:
            if found:
                connection.execute(MOVE, {"old": found[0], "new": self.endpoint})
            connection.execute("INSERT OR REPLACE INTO parts VALUES ('', 'endpoint', '', ?)", (self.endpoint,))

    def load(self, service: str, splits: dict[str, Split | Kind]) -> dict:
        """The state of a service, as ministack's `load_persisted_state` takes it; empty if there is none."""
        found: dict[Path_, Any] = {}
        paths: dict[str, Path_] = {}
        rows = self._connection.execute(
            "SELECT node, part, value FROM parts WHERE service = ? ORDER BY part != '', rowid", (service,)
        )
        for node_text, part_text, text in rows:
            try:
                part = ast.literal_eval(part_text) if part_text else ()
                node = paths.get(node_text) or paths.setdefault(node_text, ast.literal_eval(node_text))
                value = self.decoded(text)
                if not part:
                    found[node] = value
                elif isinstance(found[node], list):
                    found[node].extend(value)
                else:
                    _inner(found[node], part[:-1])[part[-1]] = value
            except (KeyError, OSError, SyntaxError, TypeError, ValueError):
                logger.exception("%s: %s %s of %s is unreadable, left out", self.path, node_text, part_text, service)
        state: dict = {}
        for node in sorted(found, key=len):
            _inner(state, node[:-1])[node[-1]] = found[node]
        self.changes(service, state, splits)  # is in the file: what differs from it later is a change
        return state

    def changes(self, service: str, state: dict, splits: dict[str, Split | Kind]) -> Changes:
        """What differs from the file, which the caller must write next. It is compared, and copied as far as it may
        change, but not yet encoded: this is the part that has to see one moment of the state."""
        known = self._kept.get(service)
        changes = Changes(service, all=known is None)
        kept = self._kept[service] = {} if known is None else known
        seen = set()
        for path, value, kind in nodes(state, splits):
            seen.add(path)
            changed = kind.changes(kept.get(path), value)
            if changed is not None:
                kept[path], write, delete = changed
                changes.write += [(path, part, value) for part, value in write.items()]
                changes.delete += [(path, part) for part in delete]
        if len(seen) < len(kept):
            changes.gone = [path for path in kept if path not in seen]
            for path in changes.gone:
                del kept[path]
        return changes

    def forget(self, service: str) -> None:
        """Write the service anew next time."""
        self._kept.pop(service, None)

    def write(self, changes: list[Changes]) -> None:
        """Write what `changes` found, in one transaction. If that fails, the services are written anew next time.

        Raises:
            sqlite3.Error: the disk is full, for one.
        """
        if not any(changes):
            return
        try:
            rows = [row for change in changes for row in self._rows(change)]
            parts = [(change.service, repr(node), repr(part)) for change in changes for node, part in change.delete]
            gone = [(change.service, repr(node)) for change in changes for node in change.gone]
            with self._transaction() as connection:
                for change in changes:
                    if change.all:
                        connection.execute("DELETE FROM parts WHERE service = ?", (change.service,))
                for statement, of in ((DELETE_NODES, gone), (DELETE, parts), (UPSERT, rows)):
                    for batch in batches(of):
                        connection.execute(statement, (batch,))
        except BaseException:
            for change in changes:
                self.forget(change.service)
            raise
        self._remove_files()

    def _rows(self, changes: Changes) -> Iterator[tuple[str, str, str, str]]:
        for node, part, value in changes.write:
            try:
                text = self.encoded(value)
            except (RecursionError, TypeError, ValueError):  # as in ministack's own files, what is not data is not kept
                if (changes.service, node) not in self._unwritable:
                    self._unwritable.add((changes.service, node))
                    logger.exception("%s of %s cannot be written", node, changes.service)
                continue
            yield changes.service, repr(node), SHELL if part == SHELL else repr(part), text

    def encoded(self, value: Any) -> str:
        """A value as JSON, with ministack's marks for what JSON has not, and ours for large bytes.

        A space in front says that it has no marks, only what looks like them.
        """
        try:
            text = encode_plain(value)
        except TypeError:
            return self._encode(value)
        return f" {text}" if '"__' in text else text

    def decoded(self, text: str) -> Any:
        """The value that `encoded` made JSON of."""
        return self._decode(text) if '"__' in text and not text.startswith(" ") else decode_plain(text)

    def _marked(self, value: Any) -> dict:
        if not isinstance(value, (bytes, bytearray)) or len(value) < LARGE:
            return _json_default(value)
        path = self._files / hashlib.sha256(value).hexdigest()
        if not path.exists():
            self._files.mkdir(exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(value)
            os.replace(partial, path)
        return {FILE: path.name}

    def _unmarked(self, value: dict) -> Any:
        return (self._files / value[FILE]).read_bytes() if FILE in value else _json_object_hook(value)

    def _remove_files(self) -> None:
        """Remove the files that no row names any more."""
        if not (there := os.listdir(self._files) if self._files.exists() else []):
            return
        named = {name for (text,) in self._connection.execute(NAMED) for name in NAME.findall(text)}
        for name in set(there) - named:
            (self._files / name).unlink()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def set_aside(self, service: str) -> None:
        """Keep a state that its service did not take, under a name that no service has."""
        self.forget(service)
        with self._transaction() as connection:
            name = f"{service} unreadable-{int(time.time())}"
            connection.execute("UPDATE parts SET service = ? WHERE service = ?", (name, service))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
