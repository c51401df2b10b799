"""The sampler writes what smdebug's readers read, NVML's numbers included; the timer does not wait for the device."""

import sys
import time
import types
from collections import namedtuple

import pytest
import torch

import smdebug_library
from sampler import Sampler
from timer import CudaClock, HostClock, StepTimer


def test_system_metrics_and_steps_are_read_by_smdebug(tmp_path):
    begun = time.time()
    with Sampler(tmp_path / "profiler", interval=0.05) as sampler:
        sampler.step(0.02, 0.01, 0.004, 0.005)
        sampler.step(0.03, 0.02, 0.004, 0.005)
        while len(sampler.seen.cpu) < 3:
            time.sleep(0.05)
    assert all(0 <= value <= 100 for value in sampler.seen.cpu)
    assert sampler.seen.step_seconds == [0.02, 0.03] and sampler.seen.forward_seconds == [0.004, 0.004]
    with smdebug_library.smdebug():
        from smdebug.profiler.algorithm_metrics_reader import LocalAlgorithmMetricsReader
        from smdebug.profiler.system_metrics_reader import LocalSystemMetricsReader
        from smdebug.profiler.utils import TimeUnits

    span = {"start_time": begun - 60, "end_time": time.time() + 60, "unit": TimeUnits.SECONDS}
    events = LocalSystemMetricsReader(str(tmp_path / "profiler")).get_events(**span)
    assert {"CPUUtilization", "MemoryUsedPercent", "IOWait", "DiskReadThroughputInBytes",
            "ReceivedThroughputInBytes"} <= {event.dimension for event in events}  # fmt: skip
    assert {event.node_id for event in events} == {"algo-1"}
    steps = LocalAlgorithmMetricsReader(str(tmp_path / "profiler")).get_events(**span)
    lasted = {event.event_name: event.duration / 1e6 for event in steps if event.event_args["step_num"] == "1"}
    assert lasted == {"Step:ModeKeys.TRAIN": 0.03, "DataIterator": 0.02, "Forward": 0.004, "Backward": 0.005}


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A module with the part of nvidia-ml-py that is used, for two GPUs of which the second resets at times."""
    calls = []
    module = types.ModuleType("pynvml")
    use = namedtuple("use", "gpu memory")
    memory = namedtuple("memory", "total free used")

    def utilization(handle):
        if handle == "handle1" and calls.count("handle1") % 2:
            calls.append("handle1")
            raise NVMLError("GPU is lost")
        calls.append(handle)
        return use(gpu=80 if handle == "handle0" else 20, memory=5)

    module.NVMLError = NVMLError
    module.nvmlInit = lambda: calls.append("init")
    module.nvmlShutdown = lambda: calls.append("shutdown")
    module.nvmlDeviceGetCount = lambda: 2
    module.nvmlDeviceGetHandleByIndex = lambda index: f"handle{index}"
    module.nvmlDeviceGetUtilizationRates = utilization
    module.nvmlDeviceGetMemoryInfo = lambda handle: memory(total=16 * 2**30, free=12 * 2**30, used=4 * 2**30)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return calls


def test_gpus_are_sampled_one_by_one_through_nvml(tmp_path, nvml):
    with Sampler(tmp_path, interval=60) as sampler:
        sampler.sample()
        sampler.sample()
    assert sampler.seen.gpus == {"gpu0": [80.0, 80.0], "gpu1": [20.0]}
    assert sampler.seen.gpu == [50.0, 80.0] and sampler.seen.gpu_memory == [25.0, 25.0]
    assert nvml[0] == "init" and nvml[-1] == "shutdown"
    written = "".join(path.read_text() for path in tmp_path.rglob("*algo-1.json"))
    assert written.count("GPUUtilization") == 3 and written.count("GPUMemoryUtilization") == 3


def test_without_a_driver_there_are_no_gpus(tmp_path, nvml, monkeypatch):
    def no_driver():
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", no_driver)
    with Sampler(tmp_path, interval=60) as sampler:
        sampler.sample()
    assert sampler.seen.gpu == [] and sampler.seen.gpus == {} and "shutdown" not in nvml


def test_parts_of_a_step_add_up(monkeypatch):
    now = iter(range(100))
    clock = HostClock()
    monkeypatch.setattr(clock, "now", lambda: next(now))
    steps = []
    timer = StepTimer(lambda *seconds: steps.append(seconds), clock)
    timer.begin()
    for parts in (["wait", "forward", "backward"], ["wait", "forward", "backward", "forward", "backward"]):
        for part in parts:
            timer.mark(part)
        timer.end()
    assert steps == [(4, 1, 1, 1), (6, 1, 2, 2)]


class Event:
    """As torch.cuda.Event: its time is known once the device has come to it."""

    device = 0  # how far it has come
    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.recorded += 1
        self.at = Event.recorded

    def query(self):
        return self.at <= Event.device

    def elapsed_time(self, end):
        assert self.query() and end.query(), "torch raises: the event has not been reached"
        return 1000.0 * (end.at - self.at)


def test_cuda_steps_are_read_when_the_device_has_passed_them(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(setattr(Event, "device", Event.recorded)))
    steps = []
    timer = StepTimer(lambda *seconds: steps.append(seconds), CudaClock())
    timer.begin()
    for number in range(3):
        for part in ("wait", "forward", "backward"):
            timer.mark(part)
        timer.end()
        assert len(steps) == max(0, number - 1) and waits == []  # the device is two steps behind
        Event.device = 4 * number + 1
    timer.close()
    assert steps == [(4.0, 1.0, 1.0, 1.0)] * 3 and len(waits) == 1
