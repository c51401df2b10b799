"""Trains ResNet-18 on a prepared dataset; what a SageMaker training job and every trial of a tuning job run.

    python train.py --lr 0.002 --batch-size 16 --epochs 10 --image-size 64
    python train.py --training prepared --weights weights --unfreeze none --lr 0.003 --model-dir model --profile true

Without pretrained weights all layers are trained from random ones. With them, `--unfreeze none` extracts the
backbone's features once and trains `fc` on them; `layer4` and `all` fine-tune. On SIGTERM a checkpoint is written; the
same command goes on from it, to the same result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STARTED = time.time()  # before torch is imported: start-up time counts

Metrics = dict[str, float]


class TrainingError(ValueError):
    """The job cannot do what it was asked to. The text says why, and becomes the job's FailureReason."""


def number(kind: type, low: float, high: float, note: str = "") -> Callable[[str], Any]:
    """An argparse type: a number in a range, perhaps in the double quotes that SageMaker's JSON leaves around it."""

    def parse(text: str) -> Any:
        text = text.strip().strip('"')
        try:
            value = float(text)
            value = int(value) if kind is int and value == int(value) else value
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not isinstance(value, kind) or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} from {low:g} to {high:g}, not {text}{note}")
        return value

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        # The training toolkit reads hyperparameters as JSON, so that `false` arrives as Python's `False`.
        text = text.strip().strip('"').lower()
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be {', '.join(choices[:-1])} or {choices[-1]}, not {text!r}")
        return text

    return parse


def text(value: str) -> str:
    return value.strip().strip('"')


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise TrainingError(f"hyperparameters: {message}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Hyperparameters and the container's paths. Raises TrainingError with the reason."""
    model_dir = Path(os.environ.get("SM_MODEL_DIR", "/opt/ml/model"))
    root = model_dir.parent
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    # tuned
    add("--lr", type=number(float, 1e-6, 1.0), default=2e-3, help="peak of the one-cycle schedule")
    add("--batch-size", type=number(int, 2, 4096), default=16)
    add("--epochs", type=number(int, 1, 1000), default=10)
    # fixed
    add("--unfreeze", type=one_of("none", "layer4", "all"), default="none", help="what is trained beside fc")
    add("--image-size", type=number(int, 32, 1024), default=224, help="must be what the data was prepared for")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0)
    add("--weight-decay", type=number(float, 0, 1), default=0.05)
    add("--label-smoothing", type=number(float, 0, 0.5), default=0.1)
    add("--augmentation", type=one_of("none", "light", "strong"), default="light")
    add("--warm-up", type=number(float, 0, 0.9), default=0.25, help="share of the steps in which lr rises")
    add("--views", type=number(int, 1, 16), default=2, help="frozen backbone: augmented views of each picture")
    add("--patience", type=number(int, 1, 1000), default=10, help="epochs without a better one before stopping")
    add("--profile", type=one_of("true", "false"), default="false", help="hook, sampler, rules and report")
    add("--run-uri", type=text, default="", help="s3://… where findings.json and report.html are put")
    add("--model-version", type=text, default="unversioned")
    add("--dataset-hash", type=text, default="unknown")
    add("--tuning-job", type=text, default="", help="name of the tuning job, for the report")
    # the container's paths
    add("--training", type=Path, default=Path(os.environ.get("SM_CHANNEL_TRAINING", root / "input/data/training")))
    add("--weights", type=Path, default=Path(os.environ.get("SM_CHANNEL_WEIGHTS", root / "input/data/weights")))
    add("--model-dir", type=Path, default=model_dir)
    add("--output-dir", type=Path, default=Path(os.environ.get("SM_OUTPUT_DIR", root / "output")))
    add("--checkpoint-dir", type=Path, default=root / "checkpoints")
    options, unknown = parser.parse_known_args(arguments)
    # SageMaker adds names of its own (_tuning_objective_metric, sagemaker_program …); a misspelt one is an error.
    foreign = [name for name in unknown if name.startswith("--") and not name[2:].startswith(("_", "sagemaker_"))]
    if foreign:
        parser.error(f"unknown: {', '.join(foreign)}; known are {', '.join(sorted(vars(options)))}".replace("_", "-"))
    hosts = json.loads(os.environ.get("SM_HOSTS", "[]"))
    if len(hosts) > 1:
        raise TrainingError(f"this job has {len(hosts)} instances and train.py uses one: set InstanceCount to 1")
    return options


HYPERPARAMETERS = ("lr", "batch_size", "epochs", "unfreeze", "image_size", "seed", "weight_decay", "label_smoothing",
                   "augmentation", "warm_up", "views", "patience")  # fmt: skip


# Data ----------------------------------------------------------------------------------------------------------------


def load_data(options: argparse.Namespace):
    """The prepared dataset of the training channel. Raises TrainingError."""
    import data

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


def seeded(*numbers: int):
    """A generator that depends on the numbers alone (seed, epoch, step), so that any step can be repeated."""
    import numpy as np
    import torch

    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


class Pictures:
    """Batches of augmented pictures, for training convolutions."""

    def __init__(self, prepared, options: argparse.Namespace, device) -> None:
        import data

        self.prepared, self.options, self.device = prepared, options, device
        self.normalise = data.Normalise(prepared.preprocess, device)
        self.steps_per_epoch = data.batch_count(len(prepared.train), options.batch_size)

    def train(self, epoch: int, start: int) -> Iterator:
        import torch

        import data

        options = self.options
        order = torch.randperm(len(self.prepared.train), generator=seeded(options.seed, epoch))
        loader = data.batches(self.prepared.train, order, options.batch_size, self.device, start)
        for step, (images, labels) in enumerate(loader, start):
            generator = seeded(options.seed, epoch, step + 1)
            yield data.augment(self.normalise(images), options.image_size, options.augmentation, generator), labels

    def evaluation(self, split) -> Iterator:
        import torch

        import data

        for images, labels in data.batches(split, torch.arange(len(split)), 64, self.device):
            yield self.normalise(images), labels


class Features:
    """Batches of a frozen backbone's features: each picture, in several augmented views, went through it once."""

    def __init__(self, prepared, options: argparse.Namespace, device, model, autocast) -> None:
        import torch

        import data

        self.options, self.device = options, device
        pictures = Pictures(prepared, options, device)
        self.steps_per_epoch = data.batch_count(len(prepared.train), options.batch_size)
        self.labels = prepared.train.labels.to(device)
        views = []
        for view in range(options.views):
            # the first view is the plain centre, as the server sees pictures
            kind = "none" if view == 0 else options.augmentation
            loader = data.batches(prepared.train, torch.arange(len(prepared.train)), 64, device)
            views.append(torch.cat([
                extract(model, data.augment(pictures.normalise(images), options.image_size, kind,
                                            seeded(options.seed, view, step)), autocast)
                for step, (images, _) in enumerate(loader)
            ]))  # fmt: skip
        self.views = torch.stack(views)  # [views, N, 512]
        self.splits = {
            id(split): [(extract(model, images, autocast), labels) for images, labels in pictures.evaluation(split)]
            for split in (prepared.validation, prepared.test)
        }

    def train(self, epoch: int, start: int) -> Iterator:
        import torch

        generator = seeded(self.options.seed, epoch)
        count = len(self.labels)
        order = torch.randperm(count, generator=generator)
        view = torch.randint(len(self.views), (count,), generator=generator)
        for step in range(start, self.steps_per_epoch):
            last = step + 1 == self.steps_per_epoch
            at = order[step * self.options.batch_size : None if last else (step + 1) * self.options.batch_size]
            yield self.views[view[at], at], self.labels[at]

    def evaluation(self, split) -> Iterator:
        yield from self.splits[id(split)]


def extract(model, images, autocast):
    import torch

    from model import features

    with torch.inference_mode(), autocast():
        found = features(model, images).float()
    return found.clone()  # a tensor made in inference mode cannot be trained on


# Training ------------------------------------------------------------------------------------------------------------


@dataclass
class State:
    """What a checkpoint holds beside the model, the optimizer and the schedule."""

    epoch: int = 0
    step: int = 0  # batches of this epoch that are done
    loss: float = 0.0  # sums over them
    correct: int = 0
    seen: int = 0
    history: list[Metrics] = field(default_factory=list)
    best: Metrics | None = None
    best_weights: dict | None = None
    seconds: float = 0.0


class Stop:
    """True once SIGTERM arrived: SageMaker's notice before it takes a spot instance or stops a job."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked


def train_one_epoch(trained, source, criterion, optimizer, scheduler, scaler, autocast, state: State, stop, sampler):
    """From batch `state.step` to the end of the epoch; False when SIGTERM ended it. `state` sums up."""
    import torch

    waiting = time.perf_counter()
    total_loss = torch.zeros((), dtype=torch.float64)
    correct = torch.zeros((), dtype=torch.int64)
    for inputs, labels in source.train(state.epoch, state.step):
        begun = time.perf_counter()
        with autocast():
            logits = trained(inputs)
        loss = criterion(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
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
    import torch

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


def class_weights(labels, classes: int):
    """Weights of the loss that count every class alike, mean 1 over the pictures (float32 [classes])."""
    import torch

    counts = torch.bincount(labels, minlength=classes).clamp(min=1).float()
    return counts.sum() / (classes * counts)


def precision(device):
    """(autocast context factory, gradient scaler) for what the device does well."""
    import torch

    if device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device)[0] >= 8  # earlier ones emulate it slowly
        kind = torch.bfloat16 if bf16 else torch.float16
        return lambda: torch.autocast("cuda", kind), torch.amp.GradScaler("cuda", enabled=not bf16)
    fast = torch.cpu.get_capabilities()
    bf16 = bool(fast.get("avx512_bf16") or fast.get("amx_bf16") or fast.get("bf16"))
    context: Callable = (lambda: torch.autocast("cpu", torch.bfloat16)) if bf16 else nullcontext
    return context, torch.amp.GradScaler("cpu", enabled=False)


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


def save_checkpoint(path: Path, settings: dict, state: State, model, optimizer, scheduler, scaler) -> None:
    """Writes the checkpoint whole or not at all."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    content = {"settings": settings, "state": vars(state)} | {name: part.state_dict() for name, part in parts.items()}
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(path: Path, settings: dict, model, optimizer, scheduler, scaler) -> State:
    """Where to go on; a fresh State where there is no checkpoint, or one of other settings or data."""
    import torch

    if not path.is_file():
        return State()
    # weights_only refuses pickled code: a checkpoint comes from a bucket
    content = torch.load(path, map_location="cpu", weights_only=True)
    if content["settings"] != settings:
        print("checkpoint: ignored, it was made with other settings or data")
        return State()
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict(content["scheduler"])
    scaler.load_state_dict(content["scaler"])
    state = State(**content["state"])
    print(f"checkpoint: going on in epoch {state.epoch + 1}, after {state.step} batches", flush=True)
    return state


def find_weights(folder: Path) -> Path | None:
    """The one file of the weights channel; None where the job has no such channel."""
    files = sorted(folder.glob("*.pth")) if folder.is_dir() else []
    if len(files) > 1:
        raise TrainingError(f"the weights channel must hold one .pth file, not {len(files)}: "
                            f"{', '.join(f.name for f in files)}")  # fmt: skip
    return files[0] if files else None


def train(options: argparse.Namespace) -> bool:
    """The whole job. False when SIGTERM ended it: a checkpoint was written, and no model."""
    stop = Stop()
    prepared = load_data(options)
    import torch
    from torch import nn

    import artifact
    import model as models

    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = find_weights(options.weights)
    if weights is None and options.unfreeze != "all":
        print("weights: no weights channel, so all layers are trained from random weights", flush=True)
        options.unfreeze = "all"
    try:
        model = models.build(len(prepared.classes), weights)
    except models.WeightsError as error:
        raise TrainingError(str(error)) from error
    model = model.to(device, memory_format=torch.channels_last)
    models.set_trainable(model, options.unfreeze)
    autocast, scaler = precision(device)
    head_only = options.unfreeze == "none"
    if head_only:
        model.eval()
        source: Any = Features(prepared, options, device, model, autocast)
    else:
        source = Pictures(prepared, options, device)
    trained: Any = model.fc if head_only else model

    total_steps = options.epochs * source.steps_per_epoch
    criterion = nn.CrossEntropyLoss(
        class_weights(prepared.train.labels, len(prepared.classes)).to(device), label_smoothing=options.label_smoothing
    )
    optimizer = torch.optim.AdamW(models.parameter_groups(trained, options.weight_decay), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=total_steps + 1, pct_start=options.warm_up, cycle_momentum=False
    )
    settings = {name: getattr(options, name) for name in HYPERPARAMETERS}
    settings |= {"dataset": options.dataset_hash, "pictures": len(prepared.train), "classes": len(prepared.classes)}
    checkpoint = options.checkpoint_dir / "checkpoint.pt"
    state = load_checkpoint(checkpoint, settings, model, optimizer, scheduler, scaler)

    with ExitStack() as stack:
        profile = None
        if options.profile == "true":
            import profiling

            profile = stack.enter_context(
                profiling.Profile(
                    options.output_dir / "data", STARTED, trained, criterion, source.steps_per_epoch, total_steps
                )
            )
        while state.epoch < options.epochs:
            begun = time.perf_counter()
            models.train_mode(model) if not head_only else model.fc.train()
            rate = optimizer.param_groups[0]["lr"]
            if profile:
                profile.phase("train")
            whole = train_one_epoch(
                trained, source, criterion, optimizer, scheduler, scaler, autocast, state, stop,
                profile.sampler if profile else None,
            )  # fmt: skip
            state.seconds += time.perf_counter() - begun
            if not whole:
                save_checkpoint(checkpoint, settings, state, model, optimizer, scheduler, scaler)
                print(f"stopped by SIGTERM in epoch {state.epoch + 1}; checkpoint: {checkpoint}", flush=True)
                return False
            begun = time.perf_counter()
            model.eval()
            if profile:
                profile.phase("validation")
            loss, accuracy, _ = evaluate(trained, source.evaluation(prepared.validation), criterion, autocast)
            state.seconds += time.perf_counter() - begun
            metrics: Metrics = {
                "epoch": state.epoch + 1,
                "train_loss": state.loss / state.seen,
                "train_accuracy": state.correct / state.seen,
                "validation_loss": loss,
                "validation_accuracy": accuracy,
                "lr": rate,
                "seconds": round(state.seconds, 3),
            }
            print(metric_line(metrics), flush=True)
            state.history.append(metrics)
            if better(metrics, state.best):
                state.best = metrics
                state.best_weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            state.epoch, state.step, state.loss, state.correct, state.seen = state.epoch + 1, 0, 0.0, 0, 0
            state.seconds = 0.0
            if not math.isfinite(metrics["train_loss"]) or not math.isfinite(loss):
                print(f"the loss is no finite number after epoch {state.epoch}: training ends here", flush=True)
                break
            if state.best is not None and state.epoch - state.best["epoch"] >= options.patience:
                print(f"no better epoch than {state.best['epoch']} for {options.patience} epochs: training ends here")
                break
            if stop and state.epoch < options.epochs:
                save_checkpoint(checkpoint, settings, state, model, optimizer, scheduler, scaler)
                print(f"stopped by SIGTERM after epoch {state.epoch}; checkpoint: {checkpoint}", flush=True)
                return False

    learnt = state.best is not None and state.best_weights is not None
    if learnt:
        model.load_state_dict(state.best_weights)
    model.eval()
    held_out = prepared.test if len(prepared.test) else prepared.validation
    test_loss, test_accuracy, probabilities = evaluate(trained, source.evaluation(held_out), criterion, autocast)
    best = state.best or state.history[-1]
    metrics = {name: value for name, value in best.items() if math.isfinite(value)}
    if len(prepared.test) and math.isfinite(test_loss):
        metrics |= {"test_loss": test_loss, "test_accuracy": test_accuracy}
    findings: dict[str, Any] = {}
    hyperparameters = {name.replace("_", "-"): getattr(options, name) for name in HYPERPARAMETERS}
    if profile:
        findings = profile.report(options, prepared, hyperparameters, state.history, metrics, held_out, probabilities)
    if learnt:
        write_artifact(options, prepared, model, hyperparameters, metrics, findings)
    else:
        artifact.write_json(options.model_dir / artifact.CARD, {"metrics": metrics, "hyperparameters": hyperparameters})
        print("no epoch had a finite loss, so there is no model to export: lower lr", flush=True)
    print(metric_line(best), flush=True)  # SageMaker takes the last value it reads as the objective
    checkpoint.unlink(missing_ok=True)
    return True


def write_artifact(options, prepared, model, hyperparameters: dict, metrics: Metrics, findings: dict) -> None:
    """Writes every file of the model artifact to the model directory."""
    import torch

    import artifact
    from export import export

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
        options = parse_arguments(arguments)
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
