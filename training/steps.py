"""What training repeats: the step, the epoch, and the judging of a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from arguments import TrainingError
from checkpoint import Metrics, State
from precision import Precision
from timer import Timer


class BalancedLoss(nn.CrossEntropyLoss):
    """Cross entropy, smoothed, as a mean in which each picture has the weight of its class.

    torch's own weighs the smoothed share of a label by the classes that it falls on. With rare classes that becomes
    most of the loss: from 19 : 1 on (two classes, smoothing 0.1) the best answer to a picture of the common class would
    be the rare one, and the loss of a perfect model would exceed that of guessing.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None
        losses = F.cross_entropy(input, target, label_smoothing=self.label_smoothing, reduction="none")
        weights = self.weight[target]
        return (losses * weights).sum() / weights.sum()


def weight_of(criterion: nn.CrossEntropyLoss, labels: torch.Tensor) -> torch.Tensor:
    """What the loss of a batch counts in a mean over several: the criterion divided by as much."""
    return torch.tensor(len(labels)) if criterion.weight is None else criterion.weight[labels].sum()


@dataclass
class Learner:
    """What is trained, and with what. `parts`: micro-batches that a batch is cut into, more when memory runs out."""

    trained: nn.Module
    criterion: nn.CrossEntropyLoss
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    precision: Precision
    parts: int = 1
    timer: Timer = field(default_factory=Timer)
    before_step: Callable[[], None] = lambda: None  # called first in every step

    def step(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the optimizer; the loss and the number of right answers, both still on the device.

        Raises TrainingError when not even two pictures at a time fit into the GPU's memory.
        """
        self.before_step()
        while True:
            try:
                loss, correct = self.accumulate(inputs, labels)
                break
            except torch.OutOfMemoryError as error:
                if 2 * self.parts > len(labels) // 2:
                    raise TrainingError(
                        f"a batch of {len(labels)} does not fit into the GPU's memory, not even in {self.parts} parts: "
                        "take a larger instance or a smaller image-size"
                    ) from error
            # here, because within `except` the traceback holds on to the failed step's tensors
            self.parts *= 2
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            print(f"memory: batches are computed in {self.parts} parts from now on", flush=True)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return loss, correct

    def accumulate(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of the whole batch's loss, part by part. BatchNorm alone sees the parts for themselves."""
        parts = min(self.parts, max(1, len(labels) // 2))  # of two pictures or more: BatchNorm learns nothing from one
        loss = torch.zeros((), device=labels.device)
        correct = torch.zeros((), dtype=torch.int64, device=labels.device)
        for some, truth in zip(inputs.tensor_split(parts), labels.tensor_split(parts), strict=True):
            with self.precision.autocast():
                logits = self.trained(some)
            partial = self.criterion(logits.float(), truth)
            if parts > 1:
                partial = partial * (weight_of(self.criterion, truth) / weight_of(self.criterion, labels))
            self.timer.mark("forward")
            self.precision.scaler.scale(partial).backward()
            self.timer.mark("backward")
            loss += partial.detach()
            correct += (logits.argmax(1) == truth).sum()
        return loss, correct


def train_one_epoch(learner: Learner, source: Any, state: State, interrupted: Callable[[], bool]) -> bool:
    """From batch `state.step` to the end of the epoch; False where `interrupted` ended it before. `state` sums up."""
    learner.timer.begin()
    if state.step == 0:
        state.lr = learner.optimizer.param_groups[0]["lr"]
    total_loss: Any = 0.0
    total_weight: Any = 0.0
    correct: Any = 0
    for inputs, labels in source.train(state.epoch, state.step):
        learner.timer.mark("wait")
        loss, right = learner.step(inputs, labels)
        weight = weight_of(learner.criterion, labels).double()
        total_loss += loss * weight  # on the device: reading it would wait for the step
        total_weight += weight
        correct += right
        state.step, state.seen = state.step + 1, state.seen + len(labels)
        learner.timer.end()
        if state.step < source.steps_per_epoch and interrupted():
            break
    state.loss += float(total_loss)
    state.weight += float(total_weight)
    state.correct += int(correct)
    return state.step >= source.steps_per_epoch


def renew_statistics(trained: nn.Module, batches: Iterator, precision: Precision) -> None:
    """BatchNorm's means and variances anew, over batches of inputs, where it is in training mode.

    What it gathers while it learns lags behind the weights, is mostly of the last few batches, and of augmented crops,
    in which things are larger than in the central crops that are judged and served. See Wu and Johnson, Rethinking
    "Batch" in BatchNorm (2021), section 3, and Touvron et al., Fixing the train-test resolution discrepancy (2019).
    """
    layers = [module for module in trained.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
    with torch.no_grad(), precision.autocast():
        for inputs in batches:
            trained(inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def evaluate(
    trained: nn.Module, batches: Iterator, criterion: nn.CrossEntropyLoss, precision: Precision
) -> tuple[float, float, torch.Tensor]:
    """(mean loss, accuracy, probabilities [N, classes]) over batches of inputs and labels, however they are cut."""
    total, weights, correct, count, probabilities = 0.0, 0.0, 0, 0, []
    with torch.no_grad():  # not inference_mode: the hook keeps what it sees
        for inputs, labels in batches:
            with precision.autocast():
                logits = trained(inputs)
            logits = logits.float()
            weight = float(weight_of(criterion, labels))
            total, weights = total + float(criterion(logits, labels)) * weight, weights + weight
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
            probabilities.append(logits.softmax(1).cpu())
    if not count:
        return math.nan, math.nan, torch.zeros(0, 0)
    return total / weights, correct / count, torch.cat(probabilities)


def class_weights(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Weights of the loss that count every class alike, mean 1 over the pictures (float32 [classes])."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1).float()
    return counts.sum() / (classes * counts)


def metric_line(metrics: Metrics) -> str:
    """The line that the metric definitions of the training and tuning job read."""
    return (
        f"epoch={metrics['epoch']}; train:loss={metrics['train_loss']:.4f}; "
        f"train:accuracy={metrics['train_accuracy']:.4f}; "
        f"validation:loss={metrics['validation_loss']:.4f}; validation:accuracy={metrics['validation_accuracy']:.4f};"
    )


def better(metrics: Metrics, best: Metrics | None) -> bool:
    """More pictures right; with equally many, the smaller loss. Never a loss that is no number."""
    if not math.isfinite(metrics["validation_loss"]):
        return False
    key = (metrics["validation_accuracy"], -metrics["validation_loss"])
    return best is None or key > (best["validation_accuracy"], -best["validation_loss"])


def diverged(state: State) -> str:
    """Says so where the last epoch's loss is no number; empty where it is one."""
    last = state.history[-1]
    finite = math.isfinite(last["train_loss"]) and math.isfinite(last["validation_loss"])
    return "" if finite else f"the loss is no finite number after epoch {last['epoch']}"


def past_its_best(state: State, patience: int) -> str:
    """Says so where no epoch of the last ones was better than one before; empty where another may be."""
    last = state.history[-1]
    if state.best and last["epoch"] - state.best["epoch"] >= patience:
        return f"no better epoch than {state.best['epoch']} for {patience} epochs"
    return ""
