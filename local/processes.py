"""Leaving nothing behind: finding and ending everything that a process started, whatever session it moved to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below `pid`, itself not included. Empty if it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end(processes: Iterable[psutil.Process], grace: float = 1.0) -> None:
    """Terminate processes, and kill those that are still there after `grace` seconds.

    A pid that meanwhile belongs to another process is not touched: psutil compares the time of creation.
    """
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=grace)
