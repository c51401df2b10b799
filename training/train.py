"""Trains ResNet-18 on a prepared dataset; what a SageMaker training job and every trial of a tuning job run.

    export PYTHONPATH=../inference  # in a checkout, where preprocessing.py has its place
    python train.py --lr 0.002 --batch-size 16 --epochs 10 --image-size 64
    python train.py --training prepared --weights weights --unfreeze none --lr 0.003 --model-dir model --profile true

Without pretrained weights all layers are trained from random ones. With them, `--unfreeze none` extracts the
backbone's features once and trains `fc` on them; `layer4` and `all` fine-tune. A checkpoint is written every minute
and on SIGTERM; the same command goes on from it, to the same result.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import artifact
import checkpoint
import data
import model as models
from arguments import HYPERPARAMETERS, TrainingError, parse_arguments
from checkpoint import Metrics, State
from sources import Features, Pictures

# What it starts from -------------------------------------------------------------------------------------------------


def load_data(options: argparse.Namespace):
    """The prepared dataset of the training channel. Raises TrainingError."""
    try:
        prepared = data.load(options.training)
    except data.DataError as error:
        raise TrainingError(str(error)) from error
    if prepared.preprocess.size != options.image_size:
        raise TrainingError(f"image-size is {options.image_size}, but the training channel was prepared for "
                            f"{prepared.preprocess.size}: prepare it again, or set image-size to that")  # fmt: skip
    for split in (prepared.train, prepared.validation):
        if len(split) == 0:
            raise TrainingError("the training channel has no pictures in the train or validation split: label more")
    return prepared


def find_weights(folder: Path) -> Path | None:
    """The one file of the weights channel; None where the job has no such channel."""
    files = sorted(folder.glob("*.pth")) if folder.is_dir() else []
    if len(files) > 1:
        raise TrainingError(f"the weights channel must hold one .pth file, not {len(files)}: "
                            f"{', '.join(f.name for f in files)}")  # fmt: skip
    return files[0] if files else None


def build_model(options: argparse.Namespace, classes: int):
    """ResNet-18, from the file of the weights channel if there is one. Raises TrainingError."""
    weights = find_weights(options.weights)
    if weights is None and options.unfreeze != "all":
        print("weights: no weights channel, so all layers are trained from random weights", flush=True)
        options.unfreeze = "all"
    try:
        model = models.build(classes, weights)
    except models.WeightsError as error:
        raise TrainingError(str(error)) from error
    models.set_trainable(model, options.unfreeze)
    return model


def precision(device) -> Callable[[], AbstractContextManager]:
    """Autocast to bfloat16 where the device computes natively in it, else float32.

    Never float16: its loss scaling starts with gradients that overflow, which the rules would take for an explosion.
    """
    if device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = torch.cpu.get_capabilities()
        bf16 = bool(fast.get("avx512_bf16") or fast.get("amx_bf16") or fast.get("bf16"))
    return lambda: torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def class_weights(labels, classes: int):
    """Weights of the loss that count every class alike, mean 1 over the pictures (float32 [classes])."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1).float()
    return counts.sum() / (classes * counts)


# Training ------------------------------------------------------------------------------------------------------------


class Stop:
    """True once SIGTERM arrived: SageMaker's notice before it takes a spot instance or stops a job."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked


def train_one_epoch(trained, source, criterion, optimizer, scheduler, autocast, state: State, stop, sampler):
    """From batch `state.step` to the end of the epoch; False when SIGTERM ended it. `state` sums up."""
    waiting = time.perf_counter()
    total_loss = torch.zeros((), dtype=torch.float64)
    correct = torch.zeros((), dtype=torch.int64)
    for inputs, labels in source.train(state.epoch, state.step):
        begun = time.perf_counter()
        with autocast():
            logits = trained(inputs)
        loss = criterion(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        with torch.no_grad():
            total_loss += loss.detach().double().cpu() * len(labels)
            correct += (logits.argmax(1) == labels).sum().cpu()
        state.step, state.seen = state.step + 1, state.seen + len(labels)
        now = time.perf_counter()
        if sampler is not None:
            sampler.step(now - waiting, begun - waiting)
        waiting = now
        if stop and state.step < source.steps_per_epoch:
            break
    state.loss += float(total_loss)
    state.correct += int(correct)
    return state.step >= source.steps_per_epoch


def evaluate(trained, batches: Iterator, criterion, autocast):
    """(mean loss, accuracy, probabilities [N, classes]) over batches of inputs and labels."""
    total, correct, count, probabilities = 0.0, 0, 0, []
    with torch.no_grad():  # not inference_mode: the hook keeps what it sees
        for inputs, labels in batches:
            with autocast():
                logits = trained(inputs)
            logits = logits.float()
            total += float(criterion(logits, labels)) * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
            probabilities.append(logits.softmax(1).cpu())
    if not count:
        return math.nan, math.nan, torch.zeros(0, 0)
    return total / count, correct / count, torch.cat(probabilities)


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


def why_to_end(state: State, patience: int) -> str:
    """Why there is no point in another epoch, after the last one of the history; empty where there is."""
    last = state.history[-1]
    if not math.isfinite(last["train_loss"]) or not math.isfinite(last["validation_loss"]):
        return f"the loss is no finite number after epoch {last['epoch']}"
    if state.best and last["epoch"] - state.best["epoch"] >= patience:
        return f"no better epoch than {state.best['epoch']} for {patience} epochs"
    return ""


def train(options: argparse.Namespace) -> bool:
    """The whole job. False when SIGTERM ended it: a checkpoint was written, and no model."""
    stop = Stop()
    prepared = load_data(options)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = precision(device)
    model = build_model(options, len(prepared.classes)).to(device, memory_format=torch.channels_last)
    if options.unfreeze == "none":
        trained: Any = model.fc
        source: Any = Features(prepared, options, device, model.eval(), autocast)
    else:
        trained, source = model, Pictures(prepared, options, device)

    total_steps = options.epochs * source.steps_per_epoch
    weights = class_weights(prepared.train.labels, len(prepared.classes)).to(device)
    criterion = nn.CrossEntropyLoss(weights, label_smoothing=options.label_smoothing)
    optimizer = torch.optim.AdamW(models.parameter_groups(trained, options.weight_decay), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=total_steps + 1, pct_start=options.warm_up, cycle_momentum=False
    )

    settings = {name: getattr(options, name) for name in HYPERPARAMETERS}
    settings |= {"dataset": options.dataset_hash, "pictures": len(prepared.train), "classes": len(prepared.classes)}
    path = options.checkpoint_dir / "checkpoint.pt"
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state = checkpoint.load(path, settings, **parts)
    saved = time.monotonic()

    profile = None
    if options.profile == "true":
        from profiling import Profile  # needs packages that other trainings do without

        profile = Profile(options.output_dir / "data", trained, criterion, source.steps_per_epoch, total_steps)
    with profile or nullcontext():
        while state.epoch < options.epochs:
            begun, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
            models.train_mode(model)
            if profile:
                profile.phase("train")
            sampler = profile.sampler if profile else None
            whole = train_one_epoch(trained, source, criterion, optimizer, scheduler, autocast, state, stop, sampler)
            if not whole:
                state.seconds += time.perf_counter() - begun
                checkpoint.save(path, settings, state, **parts)
                print(f"stopped by SIGTERM in epoch {state.epoch + 1}; checkpoint: {path}", flush=True)
                return False

            model.eval()
            if profile:
                profile.phase("validation")
            loss, accuracy, _ = evaluate(trained, source.evaluation(prepared.validation), criterion, autocast)
            seconds = state.seconds + time.perf_counter() - begun
            metrics = state.end_epoch(loss, accuracy, rate, seconds)
            print(metric_line(metrics), flush=True)
            if better(metrics, state.best):
                state.best = metrics
                state.best_weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            if reason := why_to_end(state, options.patience):
                print(f"{reason}: training ends here", flush=True)
                break

            # SIGTERM does not reach this process in every container, and a machine can be lost without it
            if state.epoch < options.epochs and (stop or time.monotonic() - saved >= options.checkpoint_seconds):
                checkpoint.save(path, settings, state, **parts)
                saved = time.monotonic()
                if stop:
                    print(f"stopped by SIGTERM after epoch {state.epoch}; checkpoint: {path}", flush=True)
                    return False

    if state.best_weights is not None:
        model.load_state_dict(state.best_weights)
    model.eval()
    held_out = prepared.test if len(prepared.test) else prepared.validation
    test_loss, test_accuracy, probabilities = evaluate(trained, source.evaluation(held_out), criterion, autocast)
    best = state.best or state.history[-1]
    metrics = {name: value for name, value in best.items() if math.isfinite(value)}
    if len(prepared.test) and math.isfinite(test_loss):
        metrics |= {"test_loss": test_loss, "test_accuracy": test_accuracy}
    hyperparameters = {name.replace("_", "-"): getattr(options, name) for name in HYPERPARAMETERS}
    findings: dict[str, Any] = {}
    if profile:
        findings = profile.report(options, prepared, hyperparameters, state.history, metrics, held_out, probabilities)
    if state.best_weights is not None:
        write_artifact(options, prepared, model, hyperparameters, metrics, findings)
    else:
        artifact.write_json(options.model_dir / artifact.CARD, {"metrics": metrics, "hyperparameters": hyperparameters})
        print("no epoch had a finite loss, so there is no model to export: lower lr", flush=True)
    print(metric_line(best), flush=True)  # SageMaker takes the last value it reads as the objective
    path.unlink(missing_ok=True)
    return True


def write_artifact(options, prepared, model, hyperparameters: dict, metrics: Metrics, findings: dict) -> None:
    """Writes every file of the model artifact to the model directory."""
    from export import export  # needs openvino, which takes its time

    folder: Path = options.model_dir
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, folder / artifact.WEIGHTS)
    exported = export(model, prepared.preprocess, prepared.validation.images[:32], folder)
    artifact.write_json(folder / artifact.CLASSES, prepared.classes)
    (folder / artifact.PREPROCESS).write_text(prepared.preprocess.to_json())
    summary = {rule["rule"]: rule["status"] for rule in findings.get("rules", [])}
    card = artifact.model_card(
        model_version=options.model_version, dataset_hash=options.dataset_hash, hyperparameters=hyperparameters,
        metrics=metrics, findings=summary, export=exported,
    )  # fmt: skip
    artifact.write_json(folder / artifact.CARD, card)
    print(f"model: {folder}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    failure = Path(os.environ.get("SM_OUTPUT_DIR", "/opt/ml/output")) / "failure"
    try:
        options = parse_arguments(arguments, __doc__)
        failure = options.output_dir / "failure"
        train(options)
    except Exception as error:
        expected = isinstance(error, TrainingError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        failure.parent.mkdir(parents=True, exist_ok=True)
        failure.write_text(reason[:1024] + "\n")  # SageMaker's FailureReason holds 1,024 characters
        if not expected:
            raise
        print(f"train: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
