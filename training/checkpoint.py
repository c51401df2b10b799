"""The checkpoint of a training: where it stands, written whole or not at all."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Metrics = dict[str, float]


@dataclass
class State:
    """How far a training is: what a checkpoint holds beside the model, the optimizer and the schedule."""

    epoch: int = 0
    step: int = 0  # batches of this epoch that are done
    lr: float = 0.0  # of the first of them
    loss: float = 0.0  # sums over them
    weight: float = 0.0
    correct: int = 0
    seen: int = 0
    history: list[Metrics] = field(default_factory=list)
    best: Metrics | None = None
    best_weights: dict | None = None
    seconds: float = 0.0

    def end_epoch(self, validation_loss: float, validation_accuracy: float, seconds: float) -> Metrics:
        """The metrics of the epoch, which join the history; the sums begin anew."""
        self.epoch += 1
        metrics: Metrics = {
            "epoch": self.epoch,
            "train_loss": self.loss / self.weight,
            "train_accuracy": self.correct / self.seen,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "lr": self.lr,
            "seconds": round(seconds, 3),
        }
        self.history.append(metrics)
        self.step, self.loss, self.weight, self.correct, self.seen, self.seconds = 0, 0.0, 0.0, 0, 0, 0.0
        return metrics


class Checkpoint:
    """The file of a training's checkpoint.

    `settings`: what must be the same to go on from it; `seconds`: between two checkpoints; `parts`: whatever has a
    state_dict.
    """

    def __init__(self, path: Path, settings: dict, seconds: float, **parts: Any) -> None:
        self.path, self.settings, self.seconds, self.parts = path, settings, seconds, parts
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether the last one is old: SIGTERM does not reach this process in every container, and a machine can be
        lost without it."""
        return time.monotonic() - self.saved >= self.seconds

    def save(self, state: State) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": self.settings, "state": vars(state)}
        content |= {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(content, self.path.with_suffix(".part"))
        os.replace(self.path.with_suffix(".part"), self.path)
        self.saved = time.monotonic()

    def load(self) -> State:
        """Brings `parts` to where they were; a fresh State where there is no checkpoint, or one of other settings."""
        if not self.path.is_file():
            return State()
        # weights_only refuses pickled code: a checkpoint comes from a bucket
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        if content["settings"] != self.settings:
            print("checkpoint: ignored, it was made with other settings or data", flush=True)
            return State()
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        state = State(**content["state"])
        print(f"checkpoint: going on in epoch {state.epoch + 1}, after {state.step} batches", flush=True)
        return state

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
