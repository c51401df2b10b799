"""The checkpoint of a training: where it stands, written whole or not at all."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

Metrics = dict[str, float]


@dataclass
class State:
    """How far a training is: what a checkpoint holds beside the model, the optimizer and the schedule."""

    epoch: int = 0
    step: int = 0  # batches of this epoch that are done
    loss: float = 0.0  # sums over them
    correct: int = 0
    seen: int = 0
    history: list[Metrics] = field(default_factory=list)
    best: Metrics | None = None
    best_weights: dict | None = None
    seconds: float = 0.0

    def end_epoch(self, validation_loss: float, validation_accuracy: float, lr: float, seconds: float) -> Metrics:
        """The metrics of the epoch, which join the history; the sums begin anew."""
        self.epoch += 1
        metrics: Metrics = {
            "epoch": self.epoch,
            "train_loss": self.loss / self.seen,
            "train_accuracy": self.correct / self.seen,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "lr": lr,
            "seconds": round(seconds, 3),
        }
        self.history.append(metrics)
        self.step, self.loss, self.correct, self.seen, self.seconds = 0, 0.0, 0, 0, 0.0
        return metrics


def save(path: Path, settings: dict, state: State, **parts) -> None:
    """Writes the checkpoint. `parts`: whatever has a state_dict; `settings`: what must be the same to go on from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "state": vars(state)} | {name: part.state_dict() for name, part in parts.items()}
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load(path: Path, settings: dict, **parts) -> State:
    """Brings `parts` to where they were; a fresh State where there is no checkpoint, or one of other settings."""
    if not path.is_file():
        return State()
    # weights_only refuses pickled code: a checkpoint comes from a bucket
    content = torch.load(path, map_location="cpu", weights_only=True)
    if content["settings"] != settings:
        print("checkpoint: ignored, it was made with other settings or data", flush=True)
        return State()
    for name, part in parts.items():
        part.load_state_dict(content[name])
    state = State(**content["state"])
    print(f"checkpoint: going on in epoch {state.epoch + 1}, after {state.step} batches", flush=True)
    return state
