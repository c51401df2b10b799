"""From an event to the crop of its picture, within the memory and the time of the function.

The first try decodes in this process, on threads, with a budget of memory that each picture's header draws on. Such a
try may kill the function, and with it the tries of a whole batch: so from the second on a picture is decoded in a
process of its own, and so is one whose header announces much.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from signal import Signals

from classify_images import isolated
from common import limits
from common.errors import DecodingFailed, OutOfTime
from common.events import ObjectEvent
from common.objects import fetch
from preprocessing import BrokenImage, Crop, Preprocess, inspect, prepare

MIN_DECODE_SECONDS = 1.0
TURN_SECONDS = 0.5


class Budget:
    """Bytes that the pictures in the works may hold together; who wants more than are left waits."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._left = total
        self._changed = threading.Condition()

    @contextmanager
    def take(self, count: int, until: float) -> Iterator[None]:
        """Hold `count` bytes; more than there are in all means all of them. OutOfTime when they are not free."""
        count = min(count, self.total)
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= count, timeout=max(0, until - time.monotonic())):
                raise OutOfTime("the pictures beside it took too long")
            self._left -= count
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._changed.notify_all()


class Turn:
    """Decoding in this process, one picture after the other: that is less work than all at once, on as many cores.

    But nobody waits for long behind one that is slow.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def wait(self) -> Iterator[None]:
        mine = self._lock.acquire(timeout=TURN_SECONDS)
        try:
            yield
        finally:
            if mine:
                self._lock.release()


class Memory:
    """The function's memory: a quarter for files as fetched, the rest for decoding.

    Files are always taken before decoding, and whoever decodes waits for nothing: so nobody waits for ever.
    """

    def __init__(self, free: int) -> None:
        """`free`: bytes."""
        self.files = Budget(free // 4)
        self.decoding = Budget(free - free // 4)
        self.in_process = self.decoding.total // 4
        self.turn = Turn()
        self.isolated: set[int] = set()  # threads whose picture waits for a process of its own, or has one


@cache
def memory() -> Memory:
    return Memory(limits.free_memory())


def load(event: ObjectEvent, spec: Preprocess, *, isolate: bool, until: float) -> Crop | None:
    """Fetch and prepare the picture before `until` (time.monotonic); None when it was deleted meanwhile.

    Raises BrokenImage, which is for ever; DecodingFailed, OutOfTime and what S3 raises, which are for now.
    """
    limits.check_size(event)
    with memory().files.take(event.size, until):
        data = fetch(event, until)
        if data is None:
            return None
        if not isolate:
            # Opening runs the decoder's code too, so that a second try leaves it to the other process.
            header = inspect(data, spec, **limits.of_a_picture())
            if header.bytes_needed <= memory().in_process:
                with memory().decoding.take(header.bytes_needed, until), memory().turn.wait():
                    return prepare(data, spec, **limits.of_a_picture())
        return in_isolation(data, spec, until)


def in_isolation(data: bytes, spec: Preprocess, until: float) -> Crop:
    """As `prepare`, in another process with a limit of memory and time; DecodingFailed when it does not survive.

    One at a time, because each may take all the memory. They share what time is left.
    """
    budget = memory().decoding
    with _in_line() as line, budget.take(budget.total, until):
        share = (until - time.monotonic()) / len(line)
        seconds = max(MIN_DECODE_SECONDS, min(decode_seconds(), share))
        given = [spec.to_json(), json.dumps(limits.of_a_picture()), str(budget.total)]
        command = [sys.executable, "-m", isolated.__name__, *given]
        # Decoders of other people's files have no business with the function's credentials.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
            try:
                output, _ = process.communicate(data, timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                raise DecodingFailed(f"its decoding took longer than {seconds:.0f} s") from None
            finally:
                process.kill()
    if process.returncode == isolated.OUT_OF_MEMORY:
        raise DecodingFailed(f"its decoding needed more than {budget.total / 1e9:.1f} GB")
    if process.returncode < 0:
        raise DecodingFailed(
            f"it crashed the decoder (signal {-process.returncode}, {Signals(-process.returncode).name})"
        )
    if process.returncode:
        raise DecodingFailed(f"its decoder ended with exit code {process.returncode}")
    head, _, pixels = output.partition(b"\n")
    found = json.loads(head)
    if "broken" in found:
        raise BrokenImage(found["broken"])
    return Crop(pixels, **found)


@contextmanager
def _in_line() -> Iterator[set[int]]:
    """Count as one of those that want a process of their own; yields all of them."""
    line, me = memory().isolated, threading.get_ident()
    line.add(me)
    try:
        yield line
    finally:
        line.discard(me)


def decode_seconds() -> float:
    return float(os.environ["DECODE_SECONDS"])
