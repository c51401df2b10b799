"""Where the time of a training step goes: waiting for its batch, forward, backward, and the rest.

On CUDA the host runs ahead of the device, and to wait for it at every mark would slow it down. There marks are events
in the device's own stream, and are read when the device has passed them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Timer:
    """Of a training that nobody watches: measures nothing.

    `begin` before the first step, in each step `mark` after each part, and `end`. Parts that come more than once in a
    step add up.
    """

    def begin(self) -> None: ...

    def mark(self, part: str) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


class Clock(Protocol):
    def now(self) -> Any: ...

    def passed(self, moment: Any) -> bool: ...

    def seconds(self, start: Any, end: Any) -> float: ...

    def wait(self) -> None: ...


class HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def passed(self, moment: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None: ...


class CudaClock:
    """The device's: a moment is when everything sent to it until then is done."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, moment: torch.cuda.Event) -> bool:
        return bool(moment.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000  # milliseconds

    def wait(self) -> None:
        torch.cuda.synchronize()


class StepTimer(Timer):
    """Gives each step's seconds to `record(whole, wait, forward, backward)`, in order, when they are known."""

    def __init__(self, record: Callable[[float, float, float, float], None], clock: Clock) -> None:
        self.record, self.clock = record, clock
        self.marks: list[tuple[str, Any]] = []  # of the step under way: part that ended, and when
        self.pending: deque[list[tuple[str, Any]]] = deque()

    def begin(self) -> None:
        self.marks = [("", self.clock.now())]

    def mark(self, part: str) -> None:
        self.marks.append((part, self.clock.now()))

    def end(self) -> None:
        self.mark("rest")
        self.pending.append(self.marks)
        self.marks = [("", self.marks[-1][1])]  # the next step waits from here on
        while self.pending and self.clock.passed(self.pending[0][-1][1]):
            self._read(self.pending.popleft())

    def close(self) -> None:
        """Waits for the device and reads what is left."""
        self.clock.wait()
        while self.pending:
            self._read(self.pending.popleft())

    def _read(self, marks: list[tuple[str, Any]]) -> None:
        parts = {"wait": 0.0, "forward": 0.0, "backward": 0.0, "rest": 0.0}
        for (_, start), (part, end) in zip(marks, marks[1:], strict=False):
            parts[part] += self.clock.seconds(start, end)
        self.record(sum(parts.values()), parts["wait"], parts["forward"], parts["backward"])
