"""Warm start: what the champion's model gives a training whose classes are its own and new ones.

The `champion` channel holds the champion's model.tar.gz, or the files of it. The rows of `fc` for classes of the same
name are copied; those of new classes start fresh. A row means something only on the features that it was trained on, so
with `layer4` and `all` the champion's backbone comes along, and with `none` the rows are left where the champion's
backbone was not this very one. Splits never change, so what the champion has seen is in no test split.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import artifact
import model as models

NEEDED = (artifact.WEIGHTS, artifact.CLASSES, artifact.CARD)


class ChampionError(ValueError):
    """The champion channel cannot be used. The text says why and what to do."""


@dataclass(frozen=True)
class Champion:
    classes: list[str]
    state: dict[str, torch.Tensor]
    card: dict[str, Any]

    def frozen_on(self, weights: str) -> bool:
        """Whether its head was trained on the frozen backbone whose file has this sha256."""
        return self.card["hyperparameters"].get("unfreeze") == "none" and self.card.get("weights") == weights

    def start_backbone(self, model: nn.Module) -> None:
        """Copies everything but `fc`. Raises ChampionError."""
        fc = {name: value for name, value in model.state_dict().items() if name.startswith("fc.")}
        state = self.state | fc
        try:
            models.check_state(state, model.state_dict(), "the champion", "leave the channel out")
        except models.WeightsError as error:
            raise ChampionError(str(error)) from error
        model.load_state_dict(state)

    def start_head(self, fc: nn.Linear, classes: list[str]) -> None:
        """Copies the rows of the classes that it knows."""
        known = [(row, self.classes.index(name)) for row, name in enumerate(classes) if name in self.classes]
        with torch.no_grad():
            for row, there in known:
                fc.weight[row] = self.state["fc.weight"][there]
                fc.bias[row] = self.state["fc.bias"][there]
        print(f"champion: {len(known)} of {len(classes)} classes start from model "
              f"{self.card['model_version']}", flush=True)  # fmt: skip


def load(folder: Path) -> Champion | None:
    """None where the job has no such channel. Raises ChampionError."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    archive = folder / "model.tar.gz"
    try:
        if archive.is_file():
            with tarfile.open(archive) as tar:
                for name in NEEDED:
                    tar.extract(name, folder, filter="data")
        # weights_only refuses pickled code: the channel comes from a bucket
        state = torch.load(folder / artifact.WEIGHTS, map_location="cpu", weights_only=True)
        classes = json.loads((folder / artifact.CLASSES).read_text())
        card = json.loads((folder / artifact.CARD).read_text())
        if state["fc.weight"].shape != (len(classes), models.FEATURES) or "hyperparameters" not in card:
            raise ValueError(f"fc is {tuple(state['fc.weight'].shape)} for {len(classes)} classes")
    except Exception as error:  # a damaged file fails in any layer: gzip, tar, zip, pickle, JSON
        raise ChampionError(f"the champion channel holds no model that can be started from ({error}); give it the "
                            "champion's model.tar.gz, or leave the channel out") from error  # fmt: skip
    return Champion(classes, state, card)
