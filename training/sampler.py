"""Samples the machine and the steps while training runs, in SageMaker's system-metrics layout.

    <folder>/system/incremental/<YYYYmmddHH>/<epoch of the minute>.algo-1.json     one JSON object a line:
    {"Type": "cpu", "Name": "cpu0", "Dimension": "CPUUtilization", "Value": 93.1, "NodeId": "algo-1", "Timestamp": …}

    <folder>/framework/pevents/<YYYYmmddHH>/<µs of its end>_<pid>-algo-1_model_timeline.json       a Chrome trace

which smdebug's readers, and whoever knows the profiler's output in S3, can read. Values are percent unless the
dimension says otherwise.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from system_rules import SystemObservations

NODE = "algo-1"
INTERVAL = 0.5  # seconds; SageMaker's own default
TIMELINE_STEPS = 10_000  # of a longer training, the timeline shows every second or third … step


class Sampler:
    """`with Sampler(folder) as sampler:` samples in a thread; `step` records each training step's times."""

    def __init__(self, folder: Path, interval: float = INTERVAL) -> None:
        self.folder, self.interval = folder / "system" / "incremental", interval
        self.seen = SystemObservations()
        self.times: list[float] = []  # of each sample, seconds since the epoch
        self.io: list[dict[str, float]] = []  # of each sample: disk and network bytes a second
        self.step_ends: list[float] = []  # of each step, seconds since the epoch
        self._started = psutil.Process().create_time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._gpus = _gpu_handles()
        self._last: tuple[float, Any, Any] | None = None

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self.write_timeline()
        if self._gpus:
            import pynvml

            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def step(self, seconds: float, waited: float, forward: float = 0.0, backward: float = 0.0) -> None:
        """A training step took `seconds`, of which it `waited` for its batch, and computed `forward` and `backward`."""
        now = time.time()
        if not self.seen.step_seconds:
            self.seen.start_up_seconds = max(0.0, now - self._started - seconds)
        self.step_ends.append(now)
        self.seen.step_seconds.append(seconds)
        self.seen.wait_seconds.append(waited)
        self.seen.forward_seconds.append(forward)
        self.seen.backward_seconds.append(backward)

    def write_timeline(self) -> None:
        """Writes the steps' times as a trace: a row for whole steps, and one each for waiting, forward and backward."""
        if not self.step_ends:
            return
        seen = self.seen
        names = ("Step:ModeKeys.TRAIN", "DataIterator", "Forward", "Backward")
        events: list[dict[str, Any]] = []
        for row, name in enumerate(names):
            about = {"name": name, "start_time_since_epoch_in_micros": 0}  # so that `ts` is the time itself
            events.append({"name": "process_name", "ph": "M", "pid": row, "args": about})
        for number in range(0, len(self.step_ends), 1 + len(self.step_ends) // TIMELINE_STEPS):
            parts = [seen.wait_seconds[number], seen.forward_seconds[number], seen.backward_seconds[number]]
            begun = self.step_ends[number] - seen.step_seconds[number]
            starts = [begun, begun, begun + parts[0], begun + sum(parts[:2])]
            for row, (start, lasts) in enumerate(zip(starts, [seen.step_seconds[number], *parts], strict=True)):
                events.append({"name": names[row], "ph": "X", "pid": row, "ts": int(start * 1e6),
                               "dur": int(lasts * 1e6), "args": {"step_num": str(number)}})  # fmt: skip
        end = self.step_ends[-1]
        hour = datetime.fromtimestamp(end, UTC).strftime("%Y%m%d%H")
        folder = self.folder.parents[1] / "framework" / "pevents" / hour
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{int(end * 1e6)}_{os.getpid()}-{NODE}_model_timeline.json").write_text(json.dumps(events))

    def _run(self) -> None:
        psutil.cpu_percent(percpu=True)  # a thread's first call only starts its measurement
        psutil.cpu_times_percent()
        while not self._stop.wait(self.interval):
            self.sample()

    def sample(self) -> None:
        """Takes one sample and writes its lines."""
        now = time.time()
        cores = psutil.cpu_percent(percpu=True)
        waiting = getattr(psutil.cpu_times_percent(), "iowait", 0.0)  # Linux only
        memory = psutil.virtual_memory().percent
        lines = [_event("cpu", f"cpu{n}", "CPUUtilization", value, now) for n, value in enumerate(cores)]
        lines.append(_event("cpu", "iowait", "IOWait", waiting, now))
        lines.append(_event("memory", "", "MemoryUsedPercent", memory, now))
        lines += self._rates(now)
        gpu, gpu_memory = self._gpu(now, lines)
        self.times.append(now)
        self.seen.cpu.append(sum(cores) / len(cores))
        self.seen.io_wait.append(waiting)
        self.seen.memory.append(memory)
        if gpu:
            self.seen.gpu.append(sum(gpu) / len(gpu))
            self.seen.gpu_memory.append(sum(gpu_memory) / len(gpu_memory))
        minute = int(now) // 60 * 60
        path = self.folder / datetime.fromtimestamp(minute, UTC).strftime("%Y%m%d%H") / f"{minute}.{NODE}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _rates(self, now: float) -> list[dict]:
        """Disk and network bytes a second since the last sample."""
        disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
        last, self._last = self._last, (now, disk, network)
        rates = {"disk_read": 0.0, "disk_write": 0.0, "received": 0.0, "sent": 0.0}
        if last and now > last[0]:
            elapsed = now - last[0]
            if disk and last[1]:
                rates["disk_read"] = (disk.read_bytes - last[1].read_bytes) / elapsed
                rates["disk_write"] = (disk.write_bytes - last[1].write_bytes) / elapsed
            if network and last[2]:
                rates["received"] = (network.bytes_recv - last[2].bytes_recv) / elapsed
                rates["sent"] = (network.bytes_sent - last[2].bytes_sent) / elapsed
        self.io.append(rates)
        return [
            _event("platform", "disk", "DiskReadThroughputInBytes", rates["disk_read"], now),
            _event("platform", "disk", "DiskWriteThroughputInBytes", rates["disk_write"], now),
            _event("network", "", "ReceivedThroughputInBytes", rates["received"], now),
            _event("network", "", "SentThroughputInBytes", rates["sent"], now),
        ]

    def _gpu(self, now: float, lines: list[dict]) -> tuple[list[float], list[float]]:
        busy, memory = [], []
        for number, handle in enumerate(self._gpus):
            import pynvml

            with suppress(pynvml.NVMLError):  # a GPU that resets answers again in the next sample
                used = pynvml.nvmlDeviceGetUtilizationRates(handle)
                store = pynvml.nvmlDeviceGetMemoryInfo(handle)
                busy.append(float(used.gpu))
                memory.append(100 * store.used / store.total)
                self.seen.gpus.setdefault(f"gpu{number}", []).append(busy[-1])
                lines.append(_event("gpu", f"gpu{number}", "GPUUtilization", busy[-1], now))
                lines.append(_event("gpu", f"gpu{number}", "GPUMemoryUtilization", memory[-1], now))
        return busy, memory


def _event(kind: str, name: str, dimension: str, value: float, now: float) -> dict:
    return {"Type": kind, "Name": name, "Dimension": dimension, "Value": value, "NodeId": NODE, "Timestamp": now}


def _gpu_handles() -> list:
    """NVML's handles of the GPUs; none where there is no GPU, no driver or no NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # pynvml is not installed, or raises its own errors without a driver
        return []
