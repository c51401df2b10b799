"""The rules that judge a training: pure functions over statistics, with SageMaker's names, parameters and defaults.

Each `check` gets what was observed so far and returns the evidence of an issue (`step`, `tensor`, `value`) or None.
Nothing here reads files or knows smdebug; debugging.py and sampler.py bring the observations. Where a rule departs from
what AWS documents (docs.aws.amazon.com/sagemaker/latest/dg/debugger-built-in-rules.html), its docstring says how and
why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Evidence = dict[str, Any]  # step, tensor, value
TINY = 1e-12  # a loss may be 0, and relative changes are asked for


@dataclass
class Observations:
    """What a hook saved, in order of steps: mean and abs_max of tensors; of gradients std, abs_mean, l2_norm too."""

    losses: list[tuple[int, str, float]] = field(default_factory=list)  # step, split (train or validation), loss
    gradients: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    weights: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)

    def extend(self, more: Observations) -> None:
        self.losses += more.losses
        for mine, theirs in ((self.gradients, more.gradients), (self.weights, more.weights)):
            for name, statistics in theirs.items():
                mine.setdefault(name, []).extend(statistics)

    def split_losses(self, split: str) -> list[tuple[int, float]]:
        return [(step, loss) for step, where, loss in self.losses if where == split]

    def epochs(self) -> list[tuple[int, float, float]]:
        """(last step, mean train loss, mean validation loss) of each epoch: training steps, then a validation."""
        found: list[tuple[int, float, float]] = []
        train: list[float] = []
        validation: list[float] = []
        last = 0
        for step, split, loss in self.losses:
            if split == "train" and validation:
                if train:
                    found.append((last, _mean(train), _mean(validation)))
                train, validation = [], []
            (train if split == "train" else validation).append(loss)
            last = step
        if train and validation:
            found.append((last, _mean(train), _mean(validation)))
        return found


@dataclass
class SystemObservations:
    """What the sampler saw: one number a sample, in percent, for the whole machine; steps in seconds."""

    cpu: list[float] = field(default_factory=list)
    io_wait: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)  # empty: there is no GPU
    gpu_memory: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)  # of each step, spent waiting for its batch
    start_up_seconds: float = 0.0  # from the start of the process to the first step


@dataclass(frozen=True)
class Finding:
    """One rule's verdict, as findings.json holds it."""

    rule: str
    status: str  # NoIssuesFound, IssuesFound or Error
    blocking: bool
    parameters: dict[str, Any]
    evidence: Evidence | None
    advice: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    name: str
    check: Callable[..., Evidence | None]
    defaults: dict[str, Any]
    advice: str  # what to do when there is an issue
    blocking: bool = False

    def finding(self, evidence: Evidence | None, parameters: dict[str, Any]) -> Finding:
        if evidence is None:
            return Finding(self.name, "NoIssuesFound", False, parameters, None, "")
        # a rule may itself say that what it found does not spoil the model
        blocking = bool(evidence.get("blocking", self.blocking))
        evidence = {key: value for key, value in evidence.items() if key != "blocking"}
        return Finding(self.name, "IssuesFound", blocking, parameters, evidence, self.advice)

    def error(self, error: Exception, parameters: dict[str, Any]) -> Finding:
        evidence = {"step": None, "tensor": None, "value": f"{type(error).__name__}: {error}"[:500]}
        return Finding(self.name, "Error", False, parameters, evidence, "The rule could not run; see the value.")

    def judge(self, observations: Any, **given: Any) -> Finding:
        parameters = {**self.defaults, **given}
        try:
            return self.finding(self.check(observations, **parameters), parameters)
        except Exception as error:
            return self.error(error, parameters)


# Rules over tensors ---------------------------------------------------------------------------------------------------


def vanishing_gradient(seen: Observations, threshold: float) -> Evidence | None:
    """The mean of the absolute values of a gradient falls below `threshold`."""
    for name, statistics in seen.gradients.items():
        for step, values in statistics:
            if values["abs_mean"] < threshold:
                return {"step": step, "tensor": name, "value": values["abs_mean"]}
    return None


def exploding_tensor(seen: Observations, only_nan: bool) -> Evidence | None:
    """A loss, gradient or weight is not a finite number (with `only_nan`: is not a number)."""
    for step, split, loss in seen.losses:
        if math.isnan(loss) or (math.isinf(loss) and not only_nan):
            return {"step": step, "tensor": f"{split} loss", "value": str(loss)}
    for tensors in (seen.gradients, seen.weights):
        for name, statistics in tensors.items():
            for step, values in statistics:
                if math.isnan(values["mean"]) or (not math.isfinite(values["abs_max"]) and not only_nan):
                    return {"step": step, "tensor": name, "value": str(values["abs_max"])}
    return None


def loss_not_decreasing(
    seen: Observations, num_steps: int, diff_percent: float, increase_threshold_percent: float
) -> Evidence | None:
    """The training loss never falls by `diff_percent`, or rises by more than the threshold and does not come back.

    AWS compares single steps that are `num_steps` apart, which is a coin toss with small batches, and warns when the
    learning rate warms up and when a good model has converged. Here means of `num_steps` saved losses are compared with
    the lowest that follows. It blocks only when the loss never got lower than it began.
    """
    losses = seen.split_losses("train")
    windows = [losses[at : at + num_steps] for at in range(0, len(losses) - num_steps + 1, num_steps)]
    means = [_mean([loss for _, loss in window]) for window in windows]
    if len(means) < 2:
        return None
    learnt = min(means[1:]) < means[0] * (1 - diff_percent / 100)
    for number, before in enumerate(means[:-1]):
        lowest = min(means[number + 1 :])
        fall = (before - lowest) / max(before, TINY) * 100
        if fall < -increase_threshold_percent or (fall < diff_percent and not learnt):
            step = windows[number + 1][-1][0]
            return {"step": step, "tensor": "train loss", "value": round(lowest, 6), "before": round(before, 6),
                    "blocking": not learnt}  # fmt: skip
    return None


def overfit(seen: Observations, start_step: int, patience: int, ratio_threshold: float) -> Evidence | None:
    """(validation loss - training loss) / training loss exceeds the ratio in more than `patience` epochs in a row."""
    exceeded = 0
    for step, train, validation in seen.epochs():
        if step < start_step:
            continue
        ratio = (validation - train) / max(train, TINY)
        exceeded = exceeded + 1 if ratio > ratio_threshold else 0
        if exceeded > patience:
            return {"step": step, "tensor": "excess of the validation loss", "value": round(ratio, 4)}
    return None


def overtraining(seen: Observations, patience_train: int, patience_validation: int, delta: float) -> Evidence | None:
    """Training went on though neither loss got better by `delta` for as many epochs as their patience."""
    best_train = best_validation = math.inf
    idle_train = idle_validation = 0
    for step, train, validation in seen.epochs():
        idle_train = 0 if train < best_train - delta else idle_train + 1
        idle_validation = 0 if validation < best_validation - delta else idle_validation + 1
        best_train, best_validation = min(best_train, train), min(best_validation, validation)
        if idle_train >= patience_train or idle_validation >= patience_validation:
            which, idle = ("train", idle_train) if idle_train >= patience_train else ("validation", idle_validation)
            return {"step": step, "tensor": f"{which} loss", "value": idle}
    return None


def poor_weight_initialization(
    seen: Observations, threshold: float, distribution_range: float, patience: int, steps: int
) -> Evidence | None:
    """The loss does not fall for more than `patience` of the first `steps` saved steps, and the gradients look bad.

    They do when the spread of a layer's gradient (5th to 95th percentile of a normal distribution: 3.29 standard
    deviations) is below `distribution_range`, or those of two layers are more than `threshold` times apart. AWS reports
    each sign alone, and compares the inputs of activations instead of gradients; but a ResNet with BatchNorm trains
    well with either, so here they explain a loss that does not fall.
    """
    best, idle, stuck = math.inf, 0, None
    saved = sorted({step for statistics in seen.gradients.values() for step, _ in statistics})[:steps]
    for step, loss in seen.split_losses("train"):
        if step not in saved:
            continue
        idle = 0 if loss < best else idle + 1
        best = min(best, loss)
        if idle > patience:
            stuck = step
    if stuck is None:
        return None
    spreads = {
        name: 3.29 * statistics[0][1]["std"] for name, statistics in seen.gradients.items() if name.endswith("weight")
    }
    if not spreads:
        return None
    narrow, wide = min(spreads, key=lambda name: spreads[name]), max(spreads, key=lambda name: spreads[name])
    if spreads[narrow] < distribution_range or spreads[wide] > threshold * spreads[narrow]:
        return {"step": stuck, "tensor": narrow, "value": spreads[narrow], "largest": spreads[wide]}
    return None


TENSOR_RULES = {
    rule.name: rule
    for rule in (
        Rule("VanishingGradient", vanishing_gradient, {"threshold": 1e-7},
             "Raise the learning rate, shorten the frozen part, or start from pretrained weights.", blocking=True),
        Rule("ExplodingTensor", exploding_tensor, {"only_nan": False},
             "Lower the learning rate or lengthen its warm-up; look for broken labels.", blocking=True),
        Rule("LossNotDecreasing", loss_not_decreasing,
             {"num_steps": 10, "diff_percent": 0.1, "increase_threshold_percent": 5.0},
             "Try a learning rate ten times lower and ten times higher; check that labels match their pictures.",
             blocking=True),
        Rule("Overfit", overfit, {"start_step": 0, "patience": 1, "ratio_threshold": 0.1},
             "Label more pictures, or regularise: augmentation=strong, a higher weight-decay, fewer epochs."),
        Rule("Overtraining", overtraining, {"patience_train": 5, "patience_validation": 10, "delta": 0.01},
             "Fewer epochs give the same model; the best epoch was kept."),
        Rule("PoorWeightInitialization", poor_weight_initialization,
             {"threshold": 10.0, "distribution_range": 0.001, "patience": 5, "steps": 10},
             "Start from the pretrained weights, or lengthen the warm-up of the learning rate."),
    )
}  # fmt: skip


# Rules over the data --------------------------------------------------------------------------------------------------


def class_imbalance(
    seen: tuple[dict[str, int], Sequence[Sequence[int]]], threshold_imbalance: float, threshold_misprediction: float
) -> Evidence | None:
    """One class has too many pictures more than another, or is too often taken for another.

    `seen`: training pictures of each class, and the confusion matrix [true][predicted] in the same order. A class
    that is mispredicted in more than `threshold_misprediction` of its pictures counts where it is not the largest.
    """
    counts, confusion = seen
    small, large = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    ratio = counts[large] / max(counts[small], 1)
    if ratio > threshold_imbalance:
        return {"step": None, "tensor": small, "value": round(ratio, 2), "largest": large}
    for index, (name, row) in enumerate(zip(counts, confusion, strict=True)):
        wrong = (sum(row) - row[index]) / sum(row) if sum(row) else 0.0
        if wrong > threshold_misprediction and counts[name] < counts[large]:
            return {"step": None, "tensor": name, "value": round(wrong, 3), "largest": large}
    return None


CLASS_IMBALANCE = Rule(
    "ClassImbalance", class_imbalance, {"threshold_imbalance": 10.0, "threshold_misprediction": 0.7},
    "Label more pictures of the smallest class; the loss weighs classes meanwhile.",
)  # fmt: skip


# Rules over the system ------------------------------------------------------------------------------------------------


def low_gpu_utilization(
    seen: SystemObservations, threshold_p95: float, threshold_p5: float, window: int, patience: int
) -> Evidence | None:
    """Over a window of samples the GPU's 95th percentile is below `threshold_p95` and its 5th below `threshold_p5`.

    A short run is judged as one window; `patience` skips samples at the start where enough others follow.
    """
    for at, chunk in _windows(seen.gpu, window, patience):
        high, low = percentile(chunk, 95), percentile(chunk, 5)
        if high < threshold_p95 and low < threshold_p5:
            return {"step": at, "tensor": "GPUUtilization p95", "value": round(high, 1)}
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


def dataloader(seen: SystemObservations, max_wait_percent: float) -> Evidence | None:
    """Steps wait for their batches for more than this share of the time.

    AWS counts loader processes against cores, which says nothing about a loader of one thread over decoded arrays.
    """
    total = sum(seen.step_seconds)
    waited = 100 * sum(seen.wait_seconds) / total if total else 0.0
    if waited > max_wait_percent:
        return {"step": len(seen.step_seconds), "tensor": "data wait", "value": round(waited, 1)}
    return None


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


def step_outlier(seen: SystemObservations, stddev: float, n_outliers: int) -> Evidence | None:
    """More than `n_outliers` steps last longer than the mean by `stddev` standard deviations."""
    steps = seen.step_seconds[1:]  # the first one pays for compiling kernels
    if len(steps) < 2:
        return None
    mean = _mean(steps)
    limit = mean + stddev * math.sqrt(_mean([(second - mean) ** 2 for second in steps]))
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
    means = [(at, _mean(chunk)) for at, chunk in _windows(seen.gpu_memory, window, patience)]
    for (_, before), (at, after) in zip(means, means[1:], strict=False):
        if after - before > increase:
            return {"step": at, "tensor": "GPUMemoryUtilization", "value": round(after - before, 1)}
    return None


SYSTEM_RULES = {
    rule.name: rule
    for rule in (
        Rule("LowGPUUtilization", low_gpu_utilization,
             {"threshold_p95": 70, "threshold_p5": 10, "window": 500, "patience": 1000},
             "Raise the batch size, or use a smaller GPU; with a frozen backbone a CPU instance is enough."),
        Rule("CPUBottleneck", cpu_bottleneck,
             {"threshold": 50, "gpu_threshold": 10, "cpu_threshold": 90, "patience": 1000},
             "Use an instance with more cores per GPU."),
        Rule("IOBottleneck", io_bottleneck,
             {"threshold": 50, "gpu_threshold": 10, "io_threshold": 50, "patience": 1000},
             "Use an instance with a local NVMe disk, or one whose memory holds the prepared pictures."),
        Rule("GPUMemoryIncrease", gpu_memory_increase, {"increase": 5, "window": 10, "patience": 1000},
             "Something keeps tensors of past steps alive: look for losses that are summed with their graph."),
        Rule("BatchSize", batch_size,
             {"cpu_threshold_p95": 70, "gpu_threshold_p95": 70, "gpu_memory_threshold_p95": 70, "window": 500,
              "patience": 1000},
             "Raise the batch size, and the learning rate with it."),
        Rule("Dataloader", dataloader, {"max_wait_percent": 20.0},
             "Reading is slower than training: use an instance with more memory or a faster disk."),
        Rule("StepOutlier", step_outlier, {"stddev": 3, "n_outliers": 10},
             "Some steps stall: look at the system timeline beside them."),
        Rule("MaxInitializationTime", max_initialization_time, {"threshold": 20},
             "The start is slow: use FastFile mode or a smaller image size."),
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


# Helpers --------------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation, as numpy does."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _windows(values: list, window: int, patience: int):
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
