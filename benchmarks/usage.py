"""What the processes of an emulator cost: processor time and memory of itself, of each function, of the endpoint."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.25
EMULATOR, ENDPOINT = "emulator", "endpoint"  # roles; those of functions are their names
CHILD = ""  # of a function's worker: counted with it
FUNCTION = "AWS_LAMBDA_FUNCTION_NAME"


@dataclass
class Usage:
    """Of a stretch of time: seconds of processor time, and the most bytes of memory of one process, by role."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)


class Meter:
    """Follows the processes below an emulator while it is entered; `usage` is complete afterwards.

    A function's worker counts with the children that it has or had. What a process used in its last quarter of a second
    may be missed.
    """

    def __init__(self, emulator: int) -> None:
        self.emulator = emulator
        self.usage = Usage()
        self._roles: dict[tuple[int, float], str] = {}
        self._first: dict[tuple[int, float], float] = {}
        self._last: dict[tuple[int, float], float] = {}
        self._over = threading.Event()

    def __enter__(self) -> Meter:
        self._look(starting=True)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        for process, last in self._last.items():
            role = self._roles[process]
            self.usage.seconds[role] = self.usage.seconds.get(role, 0.0) + last - self._first[process]

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self, starting: bool = False) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # the emulator was killed
            emulator = psutil.Process(self.emulator)
            members = emulator.children(recursive=True)
            below: dict[int, list[int]] = {}
            for process in members:
                with contextlib.suppress(psutil.Error):
                    below.setdefault(process.ppid(), []).append(process.pid)
            for process in (emulator, *members):
                with contextlib.suppress(psutil.Error, OSError, ValueError):
                    self._note(process, below.get(process.pid, []), starting)

    def _note(self, process: psutil.Process, children: list[int], starting: bool) -> None:
        name = (process.pid, process.create_time())
        if name not in self._roles:
            self._roles[name] = self._role(process)
        role, times = self._roles[name], process.cpu_times()
        if role == CHILD:
            return
        used = times.user + times.system
        memory = peak_memory(process.pid)
        if role not in (EMULATOR, ENDPOINT):
            used += times.children_user + times.children_system
            memory += sum(map(peak_memory, children))
        self._first.setdefault(name, used if starting else 0.0)
        self._last[name] = used
        self.usage.peak[role] = max(self.usage.peak.get(role, 0), memory)

    def _role(self, process: psutil.Process) -> str:
        if process.pid == self.emulator:
            return EMULATOR
        if "serve" in process.cmdline():
            return ENDPOINT
        function = process.environ().get(FUNCTION)
        if function is None:
            return EMULATOR  # its warden
        return function if process.ppid() == self.emulator else CHILD


def peak_memory(pid: int) -> int:
    """The most bytes that a process ever had in memory, as the kernel remembers; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def union(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same moments as intervals that do not overlap, in order."""
    merged: list[tuple[float, float]] = []
    for began, ended in sorted(intervals):
        if merged and began <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], ended))
        else:
            merged.append((began, ended))
    return merged


def overlap(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> float:
    """Seconds that lie in both of two unions."""
    total, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        total += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return total
