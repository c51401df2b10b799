"""The rules that judge a training: pure functions over statistics, with SageMaker's names, parameters and defaults.

Each `check` gets what was observed so far and returns the evidence of an issue (`step`, `tensor`, `value`) or None.
Nothing here reads files or knows smdebug; watcher.py brings the observations. Where a rule departs from what AWS
documents (docs.aws.amazon.com/sagemaker/latest/dg/debugger-built-in-rules.html), its docstring says how and why. The
profiler rules are in system_rules.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Evidence = dict[str, Any]  # step, tensor, value
TINY = 1e-12  # a loss may be 0, and relative changes are asked for


Statistics = dict[str, list[tuple[int, dict[str, float]]]]  # of each tensor: (step, what was saved of it)


@dataclass
class Observations:
    """What a hook saved, in order of steps: mean and abs_max of tensors; of gradients std, abs_mean, l2_norm too."""

    losses: list[tuple[int, float]] = field(default_factory=list)  # step, loss of a batch in training
    epochs: list[tuple[int, float, float]] = field(default_factory=list)  # step, mean train loss, mean validation loss
    gradients: Statistics = field(default_factory=dict)
    weights: Statistics = field(default_factory=dict)
    # of each ReLU layer: (step, how often each of its units was active, in percent)
    activity: dict[str, list[tuple[int, list[float]]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One rule's verdict, as findings.json holds it."""

    rule: str
    status: str  # NoIssuesFound, IssuesFound or Error
    blocking: bool
    parameters: dict[str, Any]
    evidence: Evidence | None
    advice: str
    recommendation: dict[str, Any] = field(default_factory=dict)  # settings for the next run: see system_rules.py

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


def vanishing_gradient(seen: Observations, threshold: float, chance_loss: float) -> Evidence | None:
    """The mean of the absolute values of a gradient falls below `threshold`.

    The gradients of a model that has learnt its pictures are small, too. So it blocks only where the batch's loss was
    not below `chance_loss`, that of guessing, which AWS's rule lacks; without it, everywhere.
    """
    losses = dict(seen.losses)
    found: list[Evidence] = []
    for name, statistics in seen.gradients.items():
        for step, values in statistics:
            if values["abs_mean"] < threshold:
                blocking = not math.isfinite(chance_loss) or not losses.get(step, math.inf) < chance_loss
                found.append({"step": step, "tensor": name, "value": values["abs_mean"], "blocking": blocking})
    return max(found, key=lambda evidence: evidence["blocking"], default=None)  # the first that blocks, else the first


def exploding_tensor(seen: Observations, only_nan: bool) -> Evidence | None:
    """A loss, gradient or weight is not a finite number (with `only_nan`: is not a number)."""
    losses = [(step, "train loss", loss) for step, loss in seen.losses]
    for step, train, validation in seen.epochs:
        losses += [(step, "mean train loss", train), (step, "mean validation loss", validation)]
    for step, name, loss in losses:
        if math.isnan(loss) or (math.isinf(loss) and not only_nan):
            return {"step": step, "tensor": name, "value": str(loss)}
    for tensors in (seen.gradients, seen.weights):
        for name, statistics in tensors.items():
            for step, values in statistics:
                if math.isnan(values["mean"]) or (not math.isfinite(values["abs_max"]) and not only_nan):
                    return {"step": step, "tensor": name, "value": str(values["abs_max"])}
    return None


def loss_not_decreasing(
    seen: Observations, num_steps: int, diff_percent: float, increase_threshold_percent: float, start_step: int,
    chance_loss: float,
) -> Evidence | None:  # fmt: skip
    """The training loss never falls by `diff_percent`, or rises by more than the threshold and does not come back.

    AWS compares single steps that are `num_steps` apart, which is a coin toss with small batches, and warns when the
    learning rate warms up and when a good model has converged. Here the mean loss of each epoch is compared with the
    lowest that follows; until the second epoch has ended, means of `num_steps` saved losses are. It blocks only when
    the loss never got lower than `chance_loss`, that of guessing: the logarithm of the number of classes. So a training
    that starts from a good model need not get better, and one that starts with an explosion must. Without a
    `chance_loss`, it must get lower than it began. It is silent before `start_step`. AWS's rule lacks both parameters.
    It is silent, too, in the first two times `num_steps` steps: a few steps from a model that does not know a new class
    may well end above guessing.
    """
    means = [(step, train) for step, train, _ in seen.epochs]
    if len(means) < 2:
        chunks = [seen.losses[at : at + num_steps] for at in range(0, len(seen.losses) - num_steps + 1, num_steps)]
        means = [(chunk[-1][0], _mean([loss for _, loss in chunk])) for chunk in chunks]
    if len(means) < 2 or means[-1][0] < max(start_step, 2 * num_steps - 1):  # steps count from 0
        return None
    last, losses = means[-1][0], [loss for _, loss in means]
    begun, lowest = (chance_loss, min(losses)) if math.isfinite(chance_loss) else (losses[0], min(losses[1:]))
    if lowest > begun * (1 - diff_percent / 100):
        return {"step": last, "tensor": "train loss", "value": round(lowest, 6), "before": round(begun, 6)}
    for number, before in enumerate(losses[:-1]):
        lowest = min(losses[number + 1 :])
        if lowest > max(before, TINY) * (1 + increase_threshold_percent / 100):
            return {"step": last, "tensor": "train loss", "value": round(lowest, 6), "before": round(before, 6),
                    "blocking": False}  # fmt: skip
    return None


def overfit(seen: Observations, start_step: int, patience: int, ratio_threshold: float) -> Evidence | None:
    """(validation loss - training loss) / training loss exceeds the ratio in more than `patience` epochs in a row.

    AWS's rule triggers wherever that happened; this one where it still does at the end. In the first epochs BatchNorm's
    running statistics lag behind, and the validation loss with them: epochs before `start_step` (of training) do not
    count.
    """
    exceeded, ratio, last = 0, 0.0, 0
    for last, train, validation in seen.epochs:
        if last >= start_step:
            ratio = (validation - train) / max(train, TINY)
            exceeded = exceeded + 1 if ratio > ratio_threshold else 0
    if exceeded > patience:
        return {"step": last, "tensor": "excess of the validation loss", "value": round(ratio, 4)}
    return None


def dead_relu(seen: Observations, threshold_inactivity: float, threshold_layer: float) -> Evidence | None:
    """More than `threshold_layer` percent of a layer's ReLUs are active in less than `threshold_inactivity` percent.

    A unit is a channel, over all pictures of a batch and all places: a single value is 0 half of the time in any
    healthy network. Layers whose own block is frozen are not looked at, because no training could revive them.
    """
    for name, saved in seen.activity.items():
        for step, units in saved:
            dead = 100 * sum(active < threshold_inactivity for active in units) / len(units)
            if dead > threshold_layer:
                return {"step": step, "tensor": name, "value": round(dead, 1)}
    return None


def overtraining(seen: Observations, patience_train: int, patience_validation: int, delta: float) -> Evidence | None:
    """Training went on though neither loss got better by `delta` for as many epochs as their patience."""
    best_train = best_validation = math.inf
    idle_train = idle_validation = 0
    for step, train, validation in seen.epochs:
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
    for step, loss in seen.losses:
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
        Rule("VanishingGradient", vanishing_gradient, {"threshold": 1e-7, "chance_loss": math.inf},
             "Raise the learning rate, shorten the frozen part, or start from pretrained weights.", blocking=True),
        Rule("ExplodingTensor", exploding_tensor, {"only_nan": False},
             "Lower the learning rate or lengthen its warm-up; look for broken labels.", blocking=True),
        Rule("LossNotDecreasing", loss_not_decreasing,
             {"num_steps": 10, "diff_percent": 0.1, "increase_threshold_percent": 5.0, "start_step": 0,
              "chance_loss": math.inf},
             "Try a learning rate ten times lower and ten times higher; check that labels match their pictures.",
             blocking=True),
        Rule("Overfit", overfit, {"start_step": 0, "patience": 1, "ratio_threshold": 0.1},
             "Label more pictures, or regularise: augmentation=strong, a higher weight-decay, fewer epochs."),
        Rule("DeadRelu", dead_relu, {"threshold_inactivity": 1.0, "threshold_layer": 50.0},
             "Lower the learning rate or lengthen its warm-up: large steps push units below 0 for good."),
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
    that is mispredicted in more than `threshold_misprediction` of its pictures counts where the largest has a quarter
    more pictures.
    AWS's parameter `samples`, how many labels to wait for, is not needed: all of them are counted at once.
    """
    counts, confusion = seen
    small, large = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    ratio = counts[large] / max(counts[small], 1)
    if ratio > threshold_imbalance:
        return {"step": None, "tensor": small, "value": round(ratio, 2), "largest": large}
    for index, (name, row) in enumerate(zip(counts, confusion, strict=True)):
        wrong = (sum(row) - row[index]) / sum(row) if sum(row) else 0.0
        # A picture less than the largest class has is no reason for anything.
        if wrong > threshold_misprediction and counts[name] < 0.8 * counts[large]:
            return {"step": None, "tensor": name, "value": round(wrong, 3), "largest": large}
    return None


CLASS_IMBALANCE = Rule(
    "ClassImbalance", class_imbalance, {"threshold_imbalance": 10.0, "threshold_misprediction": 0.7},
    "Label more pictures of the smallest class; the loss weighs classes meanwhile.",
)  # fmt: skip


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation, as numpy does."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
