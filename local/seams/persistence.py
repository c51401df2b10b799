"""State that is on disk while the emulator runs, and not only after a clean stop.

ministack writes its state when it is told to stop, each service whole, and S3's objects as they come. Killed, it has
lost everything else. Here a thread brings `local.snapshots` up to date a few times a second, with what changed. A
service is looked at on the event loop, between two requests, so that a transaction or the move of a message is in the
file whole or not at all; encoding and writing are done in the thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from ministack import app
from ministack.core import persistence, responses
from ministack.services import lambda_svc, s3, sqs, sts

from local import objects
from local.snapshots import Changes, Growing, Items, Kind, Records, Snapshots, Split, copied

from . import expect

logger = logging.getLogger("houndloop.persistence")

INTERVAL_SECONDS = 0.2  # between two looks at the state; half of what one took, if that is longer
RETRY_SECONDS = 5.0  # after a write that failed: all of what it was to write is written anew then
FILE = "state.sqlite"
GetState = Callable[[], dict | None]

# Stores that grow with use, and how they are taken apart.
SPLITS: dict[str, dict[str, Split | Kind]] = {
    "dynamodb": {"tables": {"items": Items(depth=2)}},
    "sqs": {"queues": {"messages": Records()}},
    # A busy second of a latency metric holds thousands of values, and only the last changes.
    "cloudwatch": {"metrics": {"": Growing(chunk=20)}, "alarm_history": {"": Growing()}},
    "cloudwatch_logs": {"log_groups": {"streams/*/events": Growing()}, "log_records": Items()},
    "stepfunctions": {"executions": {"events": Growing()}},
    "cloudformation": {"stack_events": {"": Growing()}},
    "s3": {"_multipart_uploads": {"parts": Items()}},
}
# Stores that ministack itself does not keep. Reloaded with `update`.
FURTHER = {"s3": ("_multipart_uploads", "_object_retention", "_object_legal_hold"), "sts": ("_sessions",)}
# Services whose `get_state` does nothing but copy: asked without copying, and compared where they stand.
PLAIN = (
    "dynamodb",
    "sqs",
    "cloudwatch",
    "cloudwatch_logs",
    "stepfunctions",
    "cloudformation",
    "eventbridge",
    "iam",
    "scheduler",
    "sns",
    "s3",
)
IN_PLACE = SimpleNamespace(deepcopy=lambda value: value)
SHARING = SimpleNamespace(deepcopy=copied)  # for Lambda, which changes its copy, and whose code is large


def living_state(service: str, get_state: GetState) -> dict | None:
    """What `get_state` returns, without its `copy.deepcopy` of everything that the service has."""
    instead = IN_PLACE if service in PLAIN else SHARING if service == "lambda" else None
    if instead and isinstance(get_state, FunctionType):
        get_state = FunctionType(get_state.__code__, {**get_state.__globals__, "copy": instead})
    state = get_state()
    if state is not None and service in FURTHER:
        module = app._get_module(app._state_map[service])
        state = {**state, **{name: getattr(module, name) for name in FURTHER[service]}}
    return state


class Saver:
    """Writes what changed, until `finish`."""

    def __init__(self, snapshots: Snapshots) -> None:
        self.snapshots = snapshots
        self.written: Callable[[], None] = lambda: None  # called when a sweep is on disk
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="save", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def _run(self) -> None:
        pause = INTERVAL_SECONDS
        while not self._over.wait(pause):
            began = time.monotonic()
            least = INTERVAL_SECONDS if self._saved() else RETRY_SECONDS
            pause = max(least, (time.monotonic() - began) / 2)

    def _saved(self) -> bool:
        try:
            self.sweep()
        except Exception:  # the disk may have room again next time
            logger.exception("the state could not be saved")
            return False
        return True

    def sweep(self) -> None:
        """Bring the file up to date. Not on the event loop."""
        self.snapshots.write(on_loop(self._look))
        self.written()

    def _look(self) -> list[Changes]:
        """All services at once: each turn on a busy event loop has to be waited for."""
        found = []
        for service, get_state in app._build_persistence_save_dict().items():
            try:
                found += self._changes(service, get_state)
            except Exception:
                logger.exception("the state of %s could not be looked at", service)
                self.snapshots.forget(service)
        return found

    def _changes(self, service: str, get_state: GetState) -> list[Changes]:
        state = living_state(service, get_state)
        # Event source mappings take messages in a thread of their own.
        with sqs._queues_lock if service == "sqs" else contextlib.nullcontext():
            changes = state is not None and self.snapshots.changes(service, state, SPLITS.get(service, {}))
        return [changes] if changes else []

    def finish(self) -> None:
        """Save for the last time. Not on the event loop."""
        self._over.set()
        self._thread.join()
        self._saved()
        self.snapshots.close()


def on_loop(call: Callable[[], Any]) -> Any:
    """Run `call` on the event loop that serves requests, and wait for it."""
    loop: asyncio.AbstractEventLoop | None = app._MAIN_LOOP
    if loop is None or not loop.is_running():
        return call()
    done: Future = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    loop.call_soon_threadsafe(run)
    return done.result()


def load(snapshots: Snapshots) -> None:
    """Give every service the state it had. One that does not take it begins anew, and its state is set aside."""
    for service in snapshots.services():
        name = app._state_map.get(service)
        if name is None:
            continue
        state = snapshots.load(service, SPLITS.get(service, {}))
        try:
            module = app._get_module(name)
            module.load_persisted_state(state)
            for further in FURTHER.get(service, ()):
                getattr(module, further).update(state.get(further, {}))
        except Exception:
            logger.exception("the state of %s could not be restored; it is set aside", service)
            snapshots.set_aside(service)
    # The processes that acted with them are gone; what has no end would never be forgotten.
    for key in [key for key, session in sts._sessions.items() if not session.get("Expiration")]:
        del sts._sessions[key]
    return_messages()


def return_messages() -> None:
    """Messages that a function was working on are visible at once: it ended with the emulator that had given it them.
    Those that another consumer received stay its own until their visibility timeout ends."""
    sources = {mapping.get("EventSourceArn") for mapping in lambda_svc._esms._data.values()}
    now = time.time()
    for queue in sqs._queues._data.values():
        if queue["attributes"].get("QueueArn") in sources:
            for message in queue["messages"]:
                if message.get("receive_count") and message["visible_at"] > now:
                    message["visible_at"] = now


_saver: Saver | None = None


def finish() -> None:
    """Save for the last time, if state is kept at all. Not on the event loop."""
    global _saver
    saver, _saver = _saver, None
    if saver is not None:
        saver.finish()


def persist_object(bucket: str, key: str, record: dict) -> None:
    """Put an object's data and metadata on disk, both or neither.

    ministack replaces one file, then the other: killed in between, it would serve new data under the old size, ETag
    and version.
    """
    path = s3._object_disk_path(bucket, key)
    if path is None:
        return
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    metadata = json.dumps({**s3._object_meta_from_record(record), **s3._key_history_meta(bucket, key), "key": key})
    if record.get("body") is None:  # the data on disk stands
        s3._atomic_write(path + objects.METADATA, metadata, text=True)
    else:
        objects.write(path, record["body"], metadata)
        record["body"] = None  # read from disk from now on, also as a version
        for version in s3._object_versions.get((bucket, key), ()):
            if version["version_id"] == (record.get("version_id") or "null"):
                version["data"] = None
    bucket_folder = os.path.join(s3.DATA_DIR, responses.get_account_id(), bucket)
    s3._remove_key_files(s3._other_key_disk_path(bucket_folder, key, path))


def _install_code(saver: Saver) -> None:
    """Lambda's code: hashed once, and removed when the state that no longer names it is on disk."""
    write = expect("persistence", lambda_svc, "_write_code_blob", "code_zip")
    prune = expect("persistence", lambda_svc, "_prune_orphan_code_blobs", "referenced")
    hashed: dict[int, tuple[bytes, str]] = {}
    referenced: list[set[str]] = []

    def write_code_blob(code: bytes) -> str:
        known = hashed.get(id(code))
        if known is None or known[0] is not code:
            known = hashed[id(code)] = (code, write(code))
        return known[1]

    def written() -> None:
        if referenced:
            current = referenced.pop()
            referenced.clear()
            for identity in [identity for identity, (_, digest) in hashed.items() if digest not in current]:
                del hashed[identity]
            prune(current)

    lambda_svc._write_code_blob = write_code_blob
    lambda_svc._prune_orphan_code_blobs = referenced.append
    saver.written = written


def install() -> None:
    """Save as it goes and load what was saved, if ministack is to keep its state."""

    def here(module: ModuleType, name: str, *parameters: str, kind: type | None = None) -> Any:
        return expect("persistence", module, name, *parameters, kind=kind)

    here(app, "_load_persisted_state")
    here(app, "save_all", "services")
    here(app, "_build_persistence_save_dict")
    here(app, "_get_module", "name")
    here(app, "_state_map", kind=dict)
    here(sqs, "_queues", kind=responses.AccountRegionScopedDict)
    here(sqs, "_queue_url_for_account", "account_id", "name")
    here(sqs, "_queues_lock", kind=type(threading.Lock()))
    here(lambda_svc, "_esms", kind=responses.AccountRegionScopedDict)
    here(sts, "_sessions", kind=dict)
    here(s3, "_persist_object", "bucket", "key", "obj")
    here(s3, "_object_disk_path", "bucket", "key")
    here(s3, "_object_meta_from_record", "obj")
    here(s3, "_key_history_meta", "bucket_name", "key")
    here(s3, "_atomic_write", "fpath", "data", "text")
    here(s3, "_remove_key_files", "fpath")
    here(s3, "_other_key_disk_path", "base", "key", "fpath")
    for name in (*FURTHER["s3"], "_object_versions"):
        here(s3, name, kind=responses.AccountScopedDict)
    for service, stores in SPLITS.items():
        module = app._get_module(app._state_map[service])
        returned = ModuleType(f"{module.__name__}.get_state()")
        returned.__dict__.update(living_state(service, here(module, "get_state")) or {})
        for store in stores:
            here(returned, store, kind=object)
    if not persistence.PERSIST_STATE:
        return
    endpoint = sqs._queue_url_for_account("", "").removesuffix("/")
    snapshots = Snapshots(Path(persistence.STATE_DIR) / FILE, endpoint)
    saver = Saver(snapshots)
    _install_code(saver)
    s3._persist_object = persist_object

    def load_and_start() -> None:
        global _saver
        load(snapshots)
        _saver = saver
        saver.start()

    app._load_persisted_state = load_and_start
    app.save_all = lambda services: None  # `finish` has
