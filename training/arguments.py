"""The hyperparameters and paths of a training job, as SageMaker's script mode passes them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a model depends on beside its data; in the model card, and compared before going on from a checkpoint.
HYPERPARAMETERS = ("lr", "batch_size", "epochs", "unfreeze", "image_size", "seed", "weight_decay", "label_smoothing",
                   "augmentation", "warm_up", "views", "patience", "precision")  # fmt: skip


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
        raise TrainingError(message)


def add_what_features_depend_on(add: Callable) -> None:
    """The arguments that prepare.py has, too: train.py takes its features only where all of them are its own."""
    add("--unfreeze", type=one_of("none", "layer4", "all"), default="none", help="what is trained beside fc")
    add("--image-size", type=number(int, 32, 1024), default=224, help="of the model's input; once prepared for, fixed")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0)
    add("--augmentation", type=one_of("none", "light", "strong"), default="light")
    add("--views", type=number(int, 1, 16), default=2, help="frozen backbone: augmented views of each picture")
    add("--precision", type=one_of("auto", "float32"), default="auto", help="auto: 16 bits where they are fast")


def parse_arguments(arguments: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Hyperparameters and the container's paths. Raises TrainingError with the reason."""
    model_dir = Path(os.environ.get("SM_MODEL_DIR", "/opt/ml/model"))
    root = model_dir.parent
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    # tuned
    add("--lr", type=number(float, 1e-6, 1.0), default=2e-3, help="peak of the one-cycle schedule")
    add("--batch-size", type=number(int, 2, 4096), default=16)
    add("--epochs", type=number(int, 1, 1000), default=10)
    # fixed
    add_what_features_depend_on(add)
    add("--weight-decay", type=number(float, 0, 1), default=0.05)
    add("--label-smoothing", type=number(float, 0, 0.5), default=0.1)
    add("--warm-up", type=number(float, 0, 0.9), default=0.25, help="share of the steps in which lr rises")
    add("--patience", type=number(int, 1, 1000), default=10, help="epochs without a better one before stopping")
    add("--loader-workers", type=number(int, 1, 64), default=2, help="threads that read and augment ahead")
    add("--export", type=one_of("true", "false"), default="true", help="false: a trial, only the metrics count")
    add("--int8", type=one_of("true", "false"), default="true", help="export the model quantised to int8 as well")
    add("--profile", type=one_of("true", "false"), default="false", help="hook, sampler, rules and report")
    add("--run-uri", type=text, default="", help="s3://… where findings.json and report.html are put")
    add("--model-version", type=text, default="unversioned")
    add("--dataset-hash", type=text, default="unknown")
    add("--tuning-job", type=text, default="", help="name of the tuning job, for the report")
    # the container's paths
    add("--training", type=Path, default=Path(os.environ.get("SM_CHANNEL_TRAINING", root / "input/data/training")))
    add("--weights", type=Path, default=Path(os.environ.get("SM_CHANNEL_WEIGHTS", root / "input/data/weights")))
    add("--champion", type=Path, default=Path(os.environ.get("SM_CHANNEL_CHAMPION", root / "input/data/champion")))
    add("--model-dir", type=Path, default=model_dir)
    add("--output-dir", type=Path, default=Path(os.environ.get("SM_OUTPUT_DIR", root / "output")))
    add("--checkpoint-dir", type=Path, default=root / "checkpoints")
    add("--checkpoint-seconds", type=number(float, 0, 86_400), default=60, help="between checkpoints, at least")
    options, unknown = parser.parse_known_args(arguments)
    # SageMaker adds names of its own (_tuning_objective_metric, sagemaker_program …); a misspelt one is an error.
    foreign = [name for name in unknown if name.startswith("--") and not name[2:].startswith(("_", "sagemaker_"))]
    if foreign:
        parser.error(f"unknown: {', '.join(foreign)}; known are {', '.join(sorted(vars(options)))}".replace("_", "-"))
    hosts = json.loads(os.environ.get("SM_HOSTS", "[]"))
    if len(hosts) > 1:
        raise TrainingError(f"this job has {len(hosts)} instances and train.py uses one: set InstanceCount to 1")
    return options
