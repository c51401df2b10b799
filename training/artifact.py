"""The layout of the model artifact (model.tar.gz): what is in it, how it is written and unpacked. Needs no torch."""

from __future__ import annotations

import json
import platform
import tarfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

WEIGHTS = "weights.pt"  # state dict, for resuming
SERVING = "model.xml"  # OpenVINO IR, with model.bin beside it
CLASSES = "classes.json"
PREPROCESS = "preprocess.json"
CARD = "model_card.json"
FILES = (WEIGHTS, SERVING, "model.bin", CLASSES, PREPROCESS, CARD)

# What older artifacts lack
INT8 = "int8/model.xml"  # the IR quantised, with model.bin beside it
REFERENCE = "reference.npz"  # what torch in float32 answers to the pictures of the test split

SPLITS = ("train", "validation", "test")

# Largest difference of a probability between torch in float32 and the exported model. The IR holds float32, but the CPU
# plugin may fold and reorder. More is no rounding: pictures are prepared otherwise, or the processor computes wrongly.
TOLERANCE = 1e-3


def model_card(
    *, model_version: str, dataset_hash: str, weights: str, champion: str, hyperparameters: dict, metrics: dict,
    findings: dict, export: dict,
) -> dict[str, Any]:  # fmt: skip
    """What model_card.json says: where the model comes from, how good it is, and what made it.

    `weights`: sha256 of the file that the backbone started from; `champion`: version of the model that it was warmed up
    with. Both may be empty.
    """
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "openvino", "nncf", "pillow", "numpy", "smdebug"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # neither smdebug nor nncf is needed by all trainings
            continue
    return {
        "model_version": model_version,
        "dataset_hash": dataset_hash,
        "architecture": "resnet18",
        "weights": weights,
        "champion": champion,
        "hyperparameters": hyperparameters,
        "metrics": metrics,
        "findings": findings,
        "export": export,
        "versions": versions,
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def extract(archive: Path, folder: Path) -> Path:
    """Unpacks model.tar.gz into `folder`. ValueError when a file of the artifact is missing."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{archive} is no model artifact: {', '.join(missing)} missing of {FILES}")
    return folder


def exit_message(processing: Path, reason: str) -> None:
    """Makes `reason` the ExitMessage of the processing job whose container's /opt/ml/processing is given."""
    if processing.name == "processing":  # else the script was called by hand
        path = processing.parent / "output" / "message"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason[:1024])  # as much as SageMaker keeps
