"""A model artifact small enough to make in a test, without torch: it classifies by the mean colour of the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from preprocessing import Preprocess

COLOURS = ("red", "green", "blue")


def make_artifact(
    folder: Path, classes: Sequence[str] = COLOURS, size: int = 32, model_version: str = "260101000000"
) -> Path:
    """An unpacked model.tar.gz. Class i answers to channel i modulo 3, later classes a little less."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.zeros((3, len(classes)), np.float32)
    for index in range(len(classes)):
        weights[index % 3, index] = 10 - index / 10
    images = ops.parameter([-1, size, size, 3], np.uint8, name="images")
    mean = ops.reduce_mean(ops.convert(images, "f32"), np.array([1, 2]), keep_dims=False)
    scores = ops.matmul(ops.divide(mean, np.float32(255)), ops.constant(weights), False, False)
    probabilities = ops.softmax(scores, 1)
    probabilities.output(0).get_tensor().set_names({"probabilities"})
    ov.save_model(ov.Model([probabilities], [images], "colours"), folder / "model.xml", compress_to_fp16=False)
    card = {"model_version": model_version, "dataset_hash": "0" * 64, "hyperparameters": {}, "metrics": {}}
    (folder / "classes.json").write_text(json.dumps(list(classes)))
    (folder / "preprocess.json").write_text(Preprocess.default(size).to_json())
    (folder / "model_card.json").write_text(json.dumps(card | {"findings": {}, "versions": {}}))
    return folder
