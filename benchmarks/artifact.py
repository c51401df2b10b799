"""A model for the benchmarks that serve: ResNet-18, exported and quantised by the project's own code.

    python -m benchmarks.artifact FOLDER

A process of its own, because a benchmark that measures others should not hold torch. Its weights are random: speed does
not depend on their values. But its BatchNorm has seen pictures, so that activations have the usual ranges and answers
differ from picture to picture, which is what the servers' answers are compared by. FOLDER is then an unpacked
model.tar.gz of every precision, and also holds weights.pt, the state dict in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.ingestion import encode, scene
from local.emulator import CHECKOUT

CLASSES = [f"breed-{number:03}" for number in range(133)]
SCENES = 8  # drawn once; each is tinted in many ways
CALIBRATION = 96
SPREAD = 3.0  # standard deviation of the logits of a picture: one class is likely, and others are possible


def tinted(count: int, seed: int, width: int = 500, height: int = 375, quality: int = 90) -> Iterator[bytes]:
    """JPEGs that differ in colour as well as in detail."""
    rng = np.random.default_rng(seed)
    scenes = [scene(width, height, 1000 * seed + number) for number in range(min(count, SCENES))]
    for number in range(count):
        flat = Image.new("RGB", (width, height), tuple(int(level) for level in rng.integers(0, 256, 3)))
        yield encode(Image.blend(scenes[number % len(scenes)], flat, float(rng.uniform(0.2, 0.8))), quality)


def make(folder: Path) -> None:
    """Writes the artifact."""
    sys.path[:0] = [str(CHECKOUT / "training"), str(CHECKOUT / "inference")]
    import torch

    from data import Normalise
    from export import export, quantise
    from model import build
    from preprocessing import Preprocess, prepare

    torch.manual_seed(0)
    spec, model = Preprocess.default(), build(len(CLASSES))
    shape = (spec.size, spec.size, 3)
    crops = np.stack([np.frombuffer(prepare(data, spec).pixels, np.uint8).reshape(shape) for data in tinted(128, 1)])
    images = Normalise(spec, torch.device("cpu"))(torch.from_numpy(crops[:CALIBRATION]))
    with torch.inference_mode():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the average of all batches
        model.train()
        for batch in images.split(32):
            model(batch)
        model.eval()
        logits = model(images[:32])
        for parameter in model.fc.parameters():
            parameter.mul_(SPREAD / float(logits.std(1).mean()))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "weights.pt")
    export(model, spec, crops[CALIBRATION:], folder)
    quantise(folder, crops[:CALIBRATION], crops[CALIBRATION:])
    card = {"model_version": "260101000000", "dataset_hash": "0" * 64, "hyperparameters": {}, "metrics": {}}
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    (folder / "preprocess.json").write_text(spec.to_json())
    (folder / "model_card.json").write_text(json.dumps(card | {"findings": {}, "versions": {}}))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
