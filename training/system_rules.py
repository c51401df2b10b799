"""The profiler rules: pure functions over what the sampler saw, with SageMaker's names, parameters and defaults.

The set is that of SageMaker's ProfilerReport. Defaults are those of AWS's own package, smdebug-rulesconfig; its
`scan_interval_us` is left out, because the samples are judged once, at the end. `patience` skips the samples of the
start where enough others follow; AWS is silent about shorter runs, here they are judged as one window. Where a rule
departs further, its docstring says how and why.

A rule may recommend settings for the next run: `batch_size`, `loader_workers`, `instance_type`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rules import Evidence, Finding, Rule, percentile

MAX_BATCH_SIZE = 4096
# Instances with one GPU, by size: each has twice the cores and the memory of the one before it.
ONE_GPU_SIZES = ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")
ONE_GPU_FAMILIES = ("ml.g4dn", "ml.g5", "ml.g6", "ml.g6e")
CPU_INSTANCE = "ml.c5.2xlarge"  # for a head on features
BINS = 10  # of LoadBalancing's histograms


@dataclass(frozen=True)
class Setup:
    """What a recommendation starts from: the settings of this run and the machine it ran on."""

    batch_size: int = 16
    pictures: int = 0  # in training
    loader_workers: int = 1
    cores: int = 1
    unfreeze: str = "all"
    instance_type: str = ""  # empty: unknown


@dataclass
class SystemObservations:
    """What the sampler saw: one number a sample, in percent, for the whole machine; steps in seconds."""

    cpu: list[float] = field(default_factory=list)
    io_wait: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)  # mean over the GPUs; empty: there is none
    gpu_memory: list[float] = field(default_factory=list)
    gpus: dict[str, list[float]] = field(default_factory=dict)  # utilisation of each
    step_seconds: list[float] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)  # of each step, spent waiting for its batch
    forward_seconds: list[float] = field(default_factory=list)
    backward_seconds: list[float] = field(default_factory=list)
    start_up_seconds: float = 0.0  # from the start of the process to the first step
    loader_workers: int = 1
    cores: int = 1


@dataclass(frozen=True)
class SystemRule(Rule):
    recommend: Callable[[Evidence, Setup], dict[str, Any]] = lambda evidence, setup: {}

    def judged(self, seen: SystemObservations, setup: Setup, **given: Any) -> Finding:
        """The finding, with what this rule recommends for the next run."""
        finding = self.judge(seen, **given)
        if finding.status != "IssuesFound" or finding.evidence is None:
            return finding
        return replace(finding, recommendation=self.recommend(finding.evidence, setup))


def low_gpu_utilization(
    seen: SystemObservations, threshold_p95: float, threshold_p5: float, window: int, patience: int
) -> Evidence | None:
    """Of a GPU's window of samples the 95th percentile is below its threshold, or only the 5th is.

    The first means that the GPU is too large for the work, the second that it waits at times. A run too short for a
    whole window is not asked for the second: it starts and ends with a GPU at rest.
    """
    for name, samples in (seen.gpus or {"gpu": seen.gpu}).items():
        for at, chunk in _windows(samples, window, patience):
            high, low = percentile(chunk, 95), percentile(chunk, 5)
            if high < threshold_p95:
                return {"step": at, "tensor": f"{name} GPUUtilization p95", "value": round(high, 1)}
            if low < threshold_p5 and len(samples) >= patience + window:
                return {"step": at, "tensor": f"{name} GPUUtilization p5", "value": round(low, 1)}
    return None


def cpu_bottleneck(
    seen: SystemObservations, threshold: float, gpu_threshold: float, cpu_threshold: float, patience: int
) -> Evidence | None:
    """In more than `threshold` percent of the samples the CPU is busy while the GPU waits."""
    return _gpu_waits(seen.cpu, seen.gpu, cpu_threshold, gpu_threshold, threshold, patience, "CPUUtilization")


def io_bottleneck(
    seen: SystemObservations, threshold: float, gpu_threshold: float, io_threshold: float, patience: int
) -> Evidence | None:
    """In more than `threshold` percent of the samples the machine waits for I/O while the GPU waits."""
    return _gpu_waits(seen.io_wait, seen.gpu, io_threshold, gpu_threshold, threshold, patience, "IOWait")


def dataloader(
    seen: SystemObservations, min_threshold: float, max_threshold: float, max_wait_percent: float
) -> Evidence | None:
    """Steps wait for their batches for more than `max_wait_percent` of the time.

    AWS counts loader processes alone, and wants them to be `min_threshold` to `max_threshold` percent of the cores. One
    thread over decoded arrays may well be enough, so here the waiting decides, and the count says what to do about it.
    """
    total = sum(seen.step_seconds)
    waited = 100 * sum(seen.wait_seconds) / total if total else 0.0
    if waited <= max_wait_percent:
        return None
    share = 100 * seen.loader_workers / seen.cores
    change = "more" if share < min_threshold else "fewer" if share > max_threshold else "as many"
    return {"step": len(seen.step_seconds), "tensor": "data wait percent", "value": round(waited, 1), "workers": change}


def batch_size(
    seen: SystemObservations, cpu_threshold_p95: float, gpu_threshold_p95: float, gpu_memory_threshold_p95: float,
    window: int, patience: int,
) -> Evidence | None:  # fmt: skip
    """CPU, GPU and GPU memory are all little used: the batch is too small for the machine."""
    for at, chunk in _windows(list(zip(seen.cpu, seen.gpu, seen.gpu_memory, strict=False)), window, patience):
        cpu, gpu, memory = (percentile(list(values), 95) for values in zip(*chunk, strict=True))
        if cpu < cpu_threshold_p95 and gpu < gpu_threshold_p95 and memory < gpu_memory_threshold_p95:
            return {"step": at, "tensor": "GPUMemoryUtilization p95", "value": round(memory, 1)}
    return None


def step_outlier(seen: SystemObservations, stddev: float, n_outliers: int, mode: str | None) -> Evidence | None:
    """More than `n_outliers` steps last longer than the mean by `stddev` standard deviations.

    Only steps of training are timed, so `mode`, which of AWS's phases to look at, makes no difference.
    """
    steps = seen.step_seconds[1:]  # the first one pays for compiling kernels
    if len(steps) < 2:
        return None
    mean = sum(steps) / len(steps)
    limit = mean + stddev * math.sqrt(sum((second - mean) ** 2 for second in steps) / len(steps))
    slow = [number for number, seconds in enumerate(steps, 1) if seconds > limit]
    if len(slow) > n_outliers:
        worst = max(slow, key=lambda number: seen.step_seconds[number])
        return {"step": worst, "tensor": "step seconds", "value": round(seen.step_seconds[worst], 4)}
    return None


def max_initialization_time(seen: SystemObservations, threshold: float) -> Evidence | None:
    """The first step began later than `threshold` minutes after the start."""
    minutes = seen.start_up_seconds / 60
    return {"step": 0, "tensor": "start-up minutes", "value": round(minutes, 2)} if minutes > threshold else None


def gpu_memory_increase(seen: SystemObservations, increase: float, window: int, patience: int) -> Evidence | None:
    """GPU memory grows from one window's mean to the next by more than `increase` percentage points."""
    means = [(at, sum(chunk) / len(chunk)) for at, chunk in _windows(seen.gpu_memory, window, patience)]
    for (_, before), (at, after) in zip(means, means[1:], strict=False):
        if after - before > increase:
            return {"step": at, "tensor": "GPUMemoryUtilization", "value": round(after - before, 1)}
    return None


def load_balancing(seen: SystemObservations, threshold: float, patience: int) -> Evidence | None:
    """The histograms of two GPUs' utilisation differ by more than `threshold`.

    AWS does not say how it measures; here it is the share of samples that would have to move from bin to bin, 0 to 1.
    """
    histograms = {}
    for name, samples in seen.gpus.items():
        samples = samples[patience:] or samples
        counts = [0] * BINS
        for value in samples:
            counts[min(int(value * BINS / 100), BINS - 1)] += 1
        if samples:
            histograms[name] = [count / len(samples) for count in counts]
    for name, one in histograms.items():
        for other_name, other in histograms.items():
            distance = sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2
            if distance > threshold:
                return {"step": len(seen.gpus[name]), "tensor": f"GPUUtilization of {name} and {other_name}",
                        "value": round(distance, 3)}  # fmt: skip
    return None


def never(seen: SystemObservations) -> Evidence | None:
    """As with AWS, the rule only measures: the tables are in the summary of the findings."""
    return None


# What to use next time ------------------------------------------------------------------------------------------------


def larger_batch(evidence: Evidence, setup: Setup) -> dict[str, Any]:
    """Twice the batch, unless an epoch would then have fewer than four steps."""
    size = 2 ** (setup.batch_size.bit_length())
    return {"batch_size": size} if size <= min(setup.pictures // 4, MAX_BATCH_SIZE) else {}


def use_of_gpu(evidence: Evidence, setup: Setup) -> dict[str, Any]:
    """A GPU that waits at times gets a faster loader; one that idles beside a frozen backbone is not needed."""
    if evidence["tensor"].endswith("p5"):
        return other_workers({"workers": "more"}, setup)
    if setup.unfreeze == "none":
        return {"instance_type": CPU_INSTANCE} if setup.instance_type else {}
    return larger_batch(evidence, setup)


def other_workers(evidence: Evidence, setup: Setup) -> dict[str, Any]:
    if evidence["workers"] == "more" and setup.loader_workers < setup.cores:
        return {"loader_workers": min(2 * setup.loader_workers, setup.cores)}
    if evidence["workers"] == "fewer":
        return {"loader_workers": setup.cores}
    return {}


def next_size(evidence: Evidence, setup: Setup) -> dict[str, Any]:
    """The next larger instance of the family that has one GPU, too."""
    family, _, size = setup.instance_type.rpartition(".")
    if family not in ONE_GPU_FAMILIES or size not in ONE_GPU_SIZES[:-1]:
        return {}
    return {"instance_type": f"{family}.{ONE_GPU_SIZES[ONE_GPU_SIZES.index(size) + 1]}"}


def one_gpu(evidence: Evidence, setup: Setup) -> dict[str, Any]:
    """train.py uses one GPU, so of several all but one are idle."""
    family = setup.instance_type.rpartition(".")[0]
    return {"instance_type": f"{family}.4xlarge"} if family in ONE_GPU_FAMILIES else {}


def recommendation(findings: Sequence[Finding]) -> dict[str, Any]:
    """What all findings recommend together; where two name the same setting, the larger or later one counts."""
    merged: dict[str, Any] = {}
    for finding in findings:
        for name, value in finding.recommendation.items():
            merged[name] = max(value, merged[name]) if isinstance(value, int) and name in merged else value
    return merged


SYSTEM_RULES = {
    rule.name: rule
    for rule in (
        SystemRule("LowGPUUtilization", low_gpu_utilization,
                   {"threshold_p95": 70, "threshold_p5": 10, "window": 500, "patience": 1000},
                   "Raise the batch size, or use a smaller GPU; with a frozen backbone a CPU instance is enough.",
                   recommend=use_of_gpu),
        SystemRule("CPUBottleneck", cpu_bottleneck,
                   {"threshold": 50, "gpu_threshold": 10, "cpu_threshold": 90, "patience": 1000},
                   "Use an instance with more cores per GPU.", recommend=next_size),
        SystemRule("IOBottleneck", io_bottleneck,
                   {"threshold": 50, "gpu_threshold": 10, "io_threshold": 50, "patience": 1000},
                   "Use an instance with a local NVMe disk, or one whose memory holds the prepared pictures.",
                   recommend=next_size),
        SystemRule("GPUMemoryIncrease", gpu_memory_increase, {"increase": 5, "window": 10, "patience": 1000},
                   "Something keeps tensors of past steps alive: look for losses that are summed with their graph."),
        SystemRule("BatchSize", batch_size,
                   {"cpu_threshold_p95": 70, "gpu_threshold_p95": 70, "gpu_memory_threshold_p95": 70, "window": 500,
                    "patience": 1000},
                   "Raise the batch size, and the learning rate with it.", recommend=larger_batch),
        SystemRule("Dataloader", dataloader,
                   {"min_threshold": 70, "max_threshold": 200, "max_wait_percent": 20.0},
                   "Reading is slower than training: change loader-workers as the evidence says; where their number is "
                   "right, use an instance with more cores, more memory or a faster disk.", recommend=other_workers),
        SystemRule("StepOutlier", step_outlier, {"stddev": 3, "n_outliers": 10, "mode": None},
                   "Some steps stall: look at the system timeline beside them."),
        SystemRule("MaxInitializationTime", max_initialization_time, {"threshold": 20},
                   "The start is slow: use FastFile mode or a smaller image size."),
        SystemRule("LoadBalancing", load_balancing, {"threshold": 0.5, "patience": 1000},
                   "Training uses one GPU: use an instance that has one.", recommend=one_gpu),
        SystemRule("OverallSystemUsage", never, {}, ""),
        SystemRule("OverallFrameworkMetrics", never, {}, ""),
    )
}  # fmt: skip


def overall_system_usage(seen: SystemObservations) -> dict[str, dict[str, float]]:
    """AWS's OverallSystemUsage: maximum, 99th, 95th and 50th percentile and minimum of each measure, in percent."""
    table = {}
    for name in ("cpu", "memory", "io_wait", "gpu", "gpu_memory"):
        values = getattr(seen, name)
        if values:
            table[name] = {f"p{p}": round(percentile(values, p), 1) for p in (99, 95, 50)}
            table[name] |= {"max": round(max(values), 1), "min": round(min(values), 1)}
    return table


def overall_framework_metrics(seen: SystemObservations) -> dict[str, dict[str, float]]:
    """AWS's OverallFrameworkMetrics: where the time of the steps went, in seconds."""
    table = {}
    for name, values in (("step", seen.step_seconds), ("data_wait", seen.wait_seconds),
                         ("forward", seen.forward_seconds), ("backward", seen.backward_seconds)):  # fmt: skip
        if values:
            table[name] = {f"p{p}": round(percentile(values, p), 6) for p in (99, 95, 50)}
            table[name] |= {"max": round(max(values), 6), "total": round(sum(values), 3)}
    return table


# Helpers --------------------------------------------------------------------------------------------------------------


def _windows(values: list, window: int, patience: int) -> Iterator[tuple[int, list]]:
    """(number of the last sample, samples) of each window after `patience` samples; a short run is one window."""
    if not values:
        return
    start = patience if len(values) >= patience + window else 0
    for at in range(start, max(start + 1, len(values) - window + 1), window):
        chunk = values[at : at + window]
        yield at + len(chunk) - 1, chunk


def _gpu_waits(
    busy: Sequence[float], gpu: Sequence[float], busy_above: float, gpu_below: float, threshold: float, patience: int,
    name: str,
) -> Evidence | None:  # fmt: skip
    pairs = list(zip(busy, gpu, strict=False))
    pairs = pairs[patience:] or pairs
    if not pairs:
        return None
    share = 100 * sum(b > busy_above and g < gpu_below for b, g in pairs) / len(pairs)
    return {"step": len(pairs), "tensor": name, "value": round(share, 1)} if share > threshold else None
