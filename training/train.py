"""Trains ResNet-18 on a prepared dataset; what a SageMaker training job and every trial of a tuning job run.

    export PYTHONPATH=../inference  # in a checkout, where preprocessing.py has its place
    python train.py --lr 0.002 --batch-size 16 --epochs 10 --image-size 64
    python train.py --training prepared --weights weights --unfreeze none --lr 0.003 --model-dir model --profile true

Channels: `training` (what prepare.py writes), `weights` (pretrained ones, optional), `champion` (a model to start from:
its head, and its backbone where that is trained; optional). Without pretrained weights all layers are trained from
random ones. With them, `--unfreeze none` trains `fc` on the backbone's features, which prepare.py has extracted (else
they are extracted here, once); `layer4` and `all` fine-tune. A checkpoint is written every minute and on SIGTERM; the
same command goes on from it, to the same result. Arguments and their ranges: arguments.py.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import artifact
import champion as champions
import data
import features
import model as models
from arguments import HYPERPARAMETERS, TrainingError, parse_arguments
from batches import Features, Pictures
from checkpoint import Checkpoint, Metrics
from precision import Precision
from steps import (
    BalancedLoss,
    Learner,
    better,
    class_weights,
    diverged,
    evaluate,
    metric_line,
    past_its_best,
    renew_statistics,
    train_one_epoch,
)

# What it starts from -------------------------------------------------------------------------------------------------


def load_data(options: argparse.Namespace) -> data.Prepared:
    """The prepared dataset of the training channel. Raises TrainingError."""
    prepared = data.load(options.training)
    if prepared.preprocess.size != options.image_size:
        raise TrainingError(f"image-size is {options.image_size}, but the training channel was prepared for "
                            f"{prepared.preprocess.size}: prepare it again, or set image-size to that")  # fmt: skip
    for split in (prepared.train, prepared.validation):
        if len(split) == 0:
            raise TrainingError("the training channel has no pictures in the train or validation split: label more")
    return prepared


@dataclass
class Start:
    """`trained` reads what `source` gives: pictures, or with a frozen backbone the features that `fc` reads."""

    trained: nn.Module
    source: Pictures | Features
    weights: Path | None
    weights_sha256: str
    champion: str  # its version; empty where nothing was taken from one


def start(options: argparse.Namespace, prepared: data.Prepared, device: torch.device) -> Start:
    """The model as it is before the first step, and its batches."""
    weights = models.find_weights(options.weights)
    if weights is None and options.unfreeze != "all":
        print("weights: no weights channel, so all layers are trained from random weights", flush=True)
        options.unfreeze = "all"
    sha256 = models.sha256(weights) if weights else ""
    champion = champions.load(options.champion)
    classes = prepared.classes
    torch.manual_seed(options.seed)
    if options.unfreeze == "none":
        assert weights is not None
        trained: Any = nn.Linear(models.FEATURES, len(classes))
        if champion and not champion.frozen_on(sha256):
            print("champion: not used, its head was trained on another backbone", flush=True)
            champion = None
        arrays = features.of(prepared, options, device, weights, sha256)
        source: Pictures | Features = Features(prepared, options, device, arrays)
    else:
        trained = models.build(len(classes), weights)
        if champion:
            champion.start_backbone(trained)
        models.set_trainable(trained, options.unfreeze)
        source = Pictures(prepared, options, device)
    if champion:
        champion.start_head(trained if options.unfreeze == "none" else trained.fc, classes)
    trained = trained.to(device, memory_format=torch.channels_last)
    return Start(trained, source, weights, sha256, champion.card["model_version"] if champion else "")


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


def train(options: argparse.Namespace) -> bool:
    """The whole job. False when SIGTERM ended it: a checkpoint was written, and no model."""
    prepared = load_data(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = Precision(device, options.precision)
    begin = start(options, prepared, device)
    stop = Stop()  # before, there is nothing to save, and SIGTERM ends the process
    trained, source = begin.trained, begin.source

    total_steps = options.epochs * source.steps_per_epoch
    weights = class_weights(prepared.train.labels, len(prepared.classes)).to(device)
    criterion = BalancedLoss(weights, label_smoothing=options.label_smoothing)
    optimizer = torch.optim.AdamW(models.parameter_groups(trained, options.weight_decay), lr=options.lr, fused=True)
    # A rise that ends with the very first step (a quarter of 3 + 1) has no length, and OneCycleLR divides by it.
    warm_up = options.warm_up * (1 - 1e-9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=total_steps + 1, pct_start=warm_up, cycle_momentum=False
    )
    learner = Learner(trained, criterion, optimizer, scheduler, precision)

    settings = {name: getattr(options, name) for name in HYPERPARAMETERS}
    settings |= {"dataset": options.dataset_hash, "pictures": len(prepared.train), "classes": len(prepared.classes)}
    settings |= {"weights": begin.weights_sha256, "champion": begin.champion}
    checkpoint = Checkpoint(
        options.checkpoint_dir / "checkpoint.pt", settings, options.checkpoint_seconds,
        model=trained, optimizer=optimizer, scheduler=scheduler, scaler=precision.scaler,
    )  # fmt: skip
    state = checkpoint.load()

    profile = None
    if options.profile == "true":
        from profiling import Profile  # needs packages that other trainings do without

        done = state.epoch * source.steps_per_epoch + state.step
        profile = Profile(
            options.output_dir / "data", trained, criterion, device, options, total_steps, done, state.history
        )
        learner.timer, learner.before_step = profile.timer, profile.before_step

    def spoilt() -> str:
        """Why a rule wants the training to end; empty while none does."""
        return profile.ended if profile else ""

    spoils = ""  # why it was ended, had it nothing good to come to
    with profile or nullcontext():
        while state.epoch < options.epochs:
            begun = time.perf_counter()
            models.train_mode(trained)
            if profile:
                profile.gradient_scale = precision.scaler.get_scale()  # it halves where a step overflows
            whole = train_one_epoch(learner, source, state, lambda: bool(stop or spoilt()) or checkpoint.due())
            if not whole and (stop or not spoilt()):
                state.seconds += time.perf_counter() - begun
                checkpoint.save(state)
                if not stop:
                    continue
                print(f"stopped by SIGTERM in epoch {state.epoch + 1}; checkpoint: {checkpoint.path}", flush=True)
                return False

            if profile:
                profile.pause()
            renew_statistics(trained, source.sample(state.epoch), precision)
            trained.eval()
            loss, accuracy, _ = evaluate(trained, source.evaluation(prepared.validation), criterion, precision)
            seconds = state.seconds + time.perf_counter() - begun
            metrics = state.end_epoch(loss, accuracy, seconds)
            print(metric_line(metrics), flush=True)
            if profile:
                profile.epoch(metrics)
            if better(metrics, state.best):
                state.best = metrics
                state.best_weights = {
                    name: value.detach().cpu().clone() for name, value in trained.state_dict().items()
                }
            spoils = spoilt() or diverged(state)
            if reason := spoils or past_its_best(state, options.patience):
                print(f"{reason}: training ends here", flush=True)
                break
            if state.epoch < options.epochs and (stop or checkpoint.due()):
                checkpoint.save(state)
                if stop:
                    print(f"stopped by SIGTERM after epoch {state.epoch}; checkpoint: {checkpoint.path}", flush=True)
                    return False

    if state.best_weights is not None:
        trained.load_state_dict(state.best_weights)
    trained.eval()
    held_out = prepared.test if len(prepared.test) else prepared.validation
    test_loss, test_accuracy, probabilities = evaluate(trained, source.evaluation(held_out), criterion, precision)
    best = state.best or state.history[-1]
    metrics = {name: value for name, value in best.items() if math.isfinite(value)}
    if len(prepared.test) and math.isfinite(test_loss):
        metrics |= {"test_loss": test_loss, "test_accuracy": test_accuracy}
    hyperparameters = {name.replace("_", "-"): getattr(options, name) for name in HYPERPARAMETERS}
    findings: dict[str, Any] = {}
    if profile:
        findings = profile.report(
            options, prepared, hyperparameters, state.history, metrics, held_out, probabilities, bool(spoils),
            state.best_weights is not None,
        )  # fmt: skip
    if state.best_weights is None:
        print("no epoch had a finite loss, so there is no model to export: lower lr", flush=True)
    write_artifact(options, prepared, begin, hyperparameters, metrics, findings, state.best_weights is not None)
    print(metric_line(best), flush=True)  # SageMaker takes the last value it reads as the objective
    checkpoint.remove()
    return True


def write_artifact(
    options: argparse.Namespace, prepared: data.Prepared, begin: Start, hyperparameters: dict, metrics: Metrics,
    findings: dict, usable: bool,
) -> None:  # fmt: skip
    """Writes the model artifact to the model directory; of a trial, and where there is no model, the card alone."""
    folder: Path = options.model_dir
    folder.mkdir(parents=True, exist_ok=True)
    exported: dict[str, Any] = {}
    if usable and options.export == "true":
        from export import calibration, export, quantise, write_reference  # need openvino, which takes its time

        model: Any = begin.trained
        if options.unfreeze == "none":
            model = models.build(len(prepared.classes), begin.weights).eval()
            model.fc = begin.trained
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, folder / artifact.WEIGHTS)
        write_reference(model, prepared.preprocess, prepared.test, next(begin.trained.parameters()).device, folder)
        crops = prepared.validation.images[:16]
        exported = {**export(model, prepared.preprocess, crops, folder)}
        if options.int8 == "true":
            try:
                exported["int8"] = quantise(folder, calibration(prepared, options.seed), crops)
            except Exception as error:  # NNCF is not installed, or fails: the model can be served all the same
                print(f"int8: not exported ({type(error).__name__}: {error})", flush=True)
        artifact.write_json(folder / artifact.CLASSES, prepared.classes)
        (folder / artifact.PREPROCESS).write_text(prepared.preprocess.to_json())
        print(f"model: {folder}", flush=True)
    summary = {rule["rule"]: rule["status"] for rule in findings.get("rules", [])}
    card = artifact.model_card(
        model_version=options.model_version, dataset_hash=options.dataset_hash, weights=begin.weights_sha256,
        champion=begin.champion, hyperparameters=hyperparameters, metrics=metrics, findings=summary, export=exported,
    )  # fmt: skip
    artifact.write_json(folder / artifact.CARD, card)


# What the owner of the data or of the job can put right: the text is the whole reason.
EXPECTED = (TrainingError, data.DataError, models.WeightsError, champions.ChampionError)


def main(arguments: list[str] | None = None) -> int:
    failure = Path(os.environ.get("SM_OUTPUT_DIR", "/opt/ml/output")) / "failure"
    try:
        options = parse_arguments(arguments, __doc__)
        failure = options.output_dir / "failure"
        train(options)
    except Exception as error:
        expected = isinstance(error, EXPECTED)
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
