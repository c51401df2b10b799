"""State on disk: what changed is written, whole or not at all, and read back as it was."""

import contextlib
import os
import random
import sqlite3
from collections import defaultdict
from functools import partial

import pytest
from ministack.core.responses import AccountRegionScopedDict

from local import objects
from local import snapshots as snapshots_module
from local.sagemaker.store import Store, record
from local.snapshots import LARGE, Growing, Items, Records, Snapshots

SPLITS = {
    "tables": {"items": Items(depth=2)},
    "queues": {"messages": Records()},
    "groups": {"streams/*/events": Growing()},
    "metrics": {"": Growing()},
    "pointers": Items(),
}


def scoped(**entries):
    store = AccountRegionScopedDict()
    store._data.update({("000000000000", "us-east-1", name): value for name, value in entries.items()})
    return store


def plain(state):
    return {name: getattr(store, "_data", store) for name, store in state.items()}


def empty():
    return {
        "tables": scoped(dogs={"name": "dogs", "items": defaultdict(dict)}),
        "queues": scoped(inbox={"attributes": {"n": "0"}, "messages": []}),
        "groups": scoped(log={"streams": {}}),
        "metrics": scoped(),
        "pointers": scoped(),
        "settings": {"limit": 1, "names": ["a"], "code": b"\x00\xff"},
    }


def entry(state, store, name):
    return state[store]._data["000000000000", "us-east-1", name]


def save(snapshots, state):
    changes = snapshots.changes("service", state, SPLITS)
    snapshots.write([changes])
    return changes


def disturb(state, chance, number):
    """Change one thing, as services do: items and events are replaced, messages and settings change in place."""
    items = entry(state, "tables", "dogs")["items"]
    messages = entry(state, "queues", "inbox")["messages"]
    match chance.randrange(12):
        case 0 | 1 | 2:
            items.setdefault(f"p{chance.randrange(9)}", {})[chance.randrange(9)] = {
                "n": {"N": str(number)},
                "b": {"B": b"\xff"},
            }
        case 3 if items:
            partition = chance.choice(list(items))
            items[partition].pop(chance.choice(list(items[partition])))
            if not items[partition]:
                del items[partition]
        case 4 | 5:
            messages.append({"id": f"m{number}", "body": "…", "visible_at": 0.5})
        case 6 if messages:
            chance.choice(messages)["visible_at"] += 1
        case 7 if messages:
            entry(state, "queues", "inbox")["messages"] = [m for m in messages if chance.random() < 0.7]
        case 8:
            stream = entry(state, "groups", "log")["streams"].setdefault(f"s{number % 3}", {"events": []})
            stream["events"].extend({"message": str(number)} for _ in range(chance.randrange(1, 300)))
        case 9:
            state["metrics"]._data["000000000000", "us-east-1", ("N", "M", f"d{number % 4}")] = [number] * (
                number % 500
            )
        case 10:
            state["pointers"]._data["000000000000", "us-east-1", f"e{number % 20}"] = {"@message": str(number)}
        case 11:
            state["settings"]["names"].append(str(number))
            entry(state, "queues", "inbox")["attributes"]["n"] = str(number)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_back_is_what_was_there(tmp_path, seed):
    chance, state = random.Random(seed), empty()
    snapshots = Snapshots(tmp_path / "state.sqlite")
    for number in range(1, 151):
        disturb(state, chance, number)
        if number % 3 == 0:
            save(snapshots, state)
            # Another connection, as after a kill: nothing was closed.
            assert plain(Snapshots(tmp_path / "state.sqlite").load("service", SPLITS)) == plain(state), number
    assert not save(snapshots, state), "nothing changed since"
    again = Snapshots(tmp_path / "state.sqlite")
    state = again.load("service", SPLITS)
    assert not save(again, state), "nor since it was loaded"
    for number in range(151, 200):
        disturb(state, chance, number)
    save(again, state)
    assert plain(Snapshots(tmp_path / "state.sqlite").load("service", SPLITS)) == plain(state)


def test_only_what_changed_is_written(tmp_path):
    state = empty()
    items = entry(state, "tables", "dogs")["items"]
    for number in range(1000):
        items[f"p{number}"]["s"] = {"n": {"N": str(number)}}
    snapshots = Snapshots(tmp_path / "state.sqlite")
    save(snapshots, state)
    items["p7"]["s"] = {"n": {"N": "8"}}
    del items["p9"]
    changes = save(snapshots, state)
    assert [part for _, part, _ in changes.write] == [("p7", "s")]
    assert [part for _, part in changes.delete] == [("p9", "s")]


def test_messages_keep_their_order(tmp_path):
    state = empty()
    messages = entry(state, "queues", "inbox")["messages"]
    messages += [{"id": name, "body": name} for name in "zaq"]
    snapshots = Snapshots(tmp_path / "state.sqlite")
    save(snapshots, state)
    messages[0]["body"] = "changed"
    messages.append({"id": "b", "body": "b"})
    save(snapshots, state)
    assert [m["id"] for m in entry(snapshots.load("service", SPLITS), "queues", "inbox")["messages"]] == list("zaqb")


def test_what_could_not_be_written_is_written_next_time(tmp_path):
    state = empty()
    snapshots = Snapshots(tmp_path / "state.sqlite")
    save(snapshots, state)
    other = sqlite3.connect(tmp_path / "state.sqlite", isolation_level=None)
    snapshots._connection.execute("PRAGMA busy_timeout = 0")
    other.execute("BEGIN IMMEDIATE")
    state["settings"]["limit"] = 2
    with pytest.raises(sqlite3.OperationalError):
        save(snapshots, state)
    other.execute("ROLLBACK")
    save(snapshots, state)
    assert snapshots.load("service", SPLITS)["settings"]["limit"] == 2


def test_large_bytes_have_files_for_as_long_as_they_are_named(tmp_path):
    uploads = {
        "uploads": scoped(u={"parts": {1: {"body": b"p" * LARGE}, 2: {"body": b"q" * LARGE}, 3: {"body": b"s"}}})
    }
    splits = {"uploads": {"parts": Items()}}
    snapshots = Snapshots(tmp_path / "state.sqlite")
    parts = uploads["uploads"]._data["000000000000", "us-east-1", "u"]["parts"]
    snapshots.write([snapshots.changes("service", uploads, splits)])
    parts[2] = {"body": b"r" * LARGE}
    snapshots.write([snapshots.changes("service", uploads, splits)])
    assert len(list((tmp_path / "files").iterdir())) == 2
    (tmp_path / "files" / "1234.partial").write_bytes(b"of a kill")
    again = Snapshots(tmp_path / "state.sqlite")
    assert plain(again.load("service", splits)) == plain(uploads)
    again.write([again.changes("service", {"uploads": scoped()}, splits)])
    assert not list((tmp_path / "files").iterdir())


def test_data_that_looks_like_a_mark_is_data(tmp_path):
    state = empty()
    state["settings"] = {"names": [{"__bytes__": "x"}, {"__scoped__": True}, {"__file__": "../state.sqlite"}]}
    save(Snapshots(tmp_path / "state.sqlite"), state)
    assert plain(Snapshots(tmp_path / "state.sqlite").load("service", SPLITS)) == plain(state)


def test_many_rows_are_written_in_several_statements(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots_module, "BATCH", 100)
    state = empty()
    entry(state, "tables", "dogs")["items"].update({f"p{n}": {"s": {"n": n * "ü"}} for n in range(90)})
    save(Snapshots(tmp_path / "state.sqlite"), state)
    assert plain(Snapshots(tmp_path / "state.sqlite").load("service", SPLITS)) == plain(state)


def test_a_file_in_use_is_not_set_aside(tmp_path, monkeypatch):
    state = empty()
    Snapshots(tmp_path / "state.sqlite").close()
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0))
    with contextlib.closing(sqlite3.connect(tmp_path / "state.sqlite", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("DELETE FROM parts")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            Snapshots(tmp_path / "state.sqlite")
        other.execute("ROLLBACK")
    save(Snapshots(tmp_path / "state.sqlite"), state)
    assert not list(tmp_path.glob("*unreadable*"))


def test_a_file_that_is_none_is_set_aside(tmp_path):
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"not a database, " * 100)
    assert Snapshots(path).services() == []
    (aside,) = tmp_path.glob("*unreadable*")
    assert aside.read_bytes().startswith(b"not a database")


def test_one_unreadable_part_costs_no_other(tmp_path):
    state = empty()
    entry(state, "tables", "dogs")["items"].update(a={"s": {"n": 1}}, b={"s": {"n": 2}})
    snapshots = Snapshots(tmp_path / "state.sqlite")
    save(snapshots, state)
    snapshots._connection.execute("UPDATE parts SET value = '{' WHERE part LIKE '(''a''%'")
    assert entry(snapshots.load("service", SPLITS), "tables", "dogs")["items"] == {"b": {"s": {"n": 2}}}


def test_a_state_that_was_not_taken_is_kept_under_another_name(tmp_path):
    snapshots = Snapshots(tmp_path / "state.sqlite")
    save(snapshots, empty())
    snapshots.set_aside("service")
    assert snapshots.load("service", SPLITS) == {}
    (name,) = snapshots.services()
    assert name.startswith("service unreadable") and snapshots.load(name, SPLITS)["settings"]["limit"] == 1


def test_queues_follow_the_emulator_to_another_port(tmp_path):
    old, new = "http://127.0.0.1:1000/", "http://127.0.0.1:2000/"
    queue = {"url": f"{old}0/q", "messages": [{"id": "m", "body": f"see {old}0/q"}]}
    save(Snapshots(tmp_path / "state.sqlite", old), {"queues": scoped(**{f"{old}0/q": queue})})
    again = Snapshots(tmp_path / "state.sqlite", new)
    found = entry(again.load("service", SPLITS), "queues", f"{new}0/q")
    assert found == {"url": f"{new}0/q", "messages": [{"id": "m", "body": f"see {old}0/q"}]}
    save(again, {"queues": scoped(**{f"{new}0/q": found})})
    assert plain(Snapshots(tmp_path / "state.sqlite", new).load("service", SPLITS)) == {
        "queues": {("000000000000", "us-east-1", f"{new}0/q"): found}
    }


@pytest.mark.parametrize("step", range(7))
def test_an_interrupted_write_leaves_an_object_old_or_new(tmp_path, monkeypatch, step):
    path = str(tmp_path / "bucket" / "key")
    os.makedirs(os.path.dirname(path))
    objects.write(path, b"old data", "old")
    taken = 0

    def killed_at_step(original):
        def call(*arguments, **named):
            nonlocal taken
            taken += 1
            if taken > step:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(objects, "_write", killed_at_step(objects._write))
        patch.setattr(os, "replace", killed_at_step(os.replace))
        try:
            objects.write(path, b"new", "new")
        except KeyboardInterrupt:
            pass
        else:
            assert step >= 5, "two files written, three names changed"
    objects.recover(tmp_path)
    left = {name: (tmp_path / "bucket" / name).read_bytes() for name in os.listdir(tmp_path / "bucket")}
    decided = step >= 3
    assert left == {"key": b"new" if decided else b"old data", "key.meta.json": b"new" if decided else b"old"}


def test_the_store_starts_with_what_it_can_read(tmp_path):
    store = Store(tmp_path)
    store.save(record("model", "good", "arn:good"))
    store.save(record("model", "bad", "arn:bad"))
    (bad,) = tmp_path.glob("*/*/*/bad.json")
    bad.write_text("{")
    bad.with_suffix(".1234.partial").write_text('{"_na')
    again = Store(tmp_path)
    assert [found["_name"] for found in again.all("model")] == ["good"]
    assert sorted(path.name for path in bad.parent.iterdir()) == ["bad.unreadable", "good.json"]
