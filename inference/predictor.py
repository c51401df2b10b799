"""A model artifact, ready to answer: used by the server and, in the same container, by the evaluation job.

OpenVINO runs the exported model on one thread; whoever wants more cores starts more processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from preprocessing import Preprocess

PRECISIONS = ("f32", "bf16")
FILES = ("model.xml", "model.bin", "classes.json", "preprocess.json", "model_card.json")


class BadArtifact(Exception):
    """The model directory is incomplete, damaged, or its parts do not belong together."""


class Predictor:
    """The model of `model_dir`. BadArtifact with the reason when it cannot serve. Not for two threads at once."""

    def __init__(self, model_dir: str | Path, precision: str = "f32") -> None:
        """`precision`: what OpenVINO may compute in, `f32` or `bf16`."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; it must be {' or '.join(PRECISIONS)}")
        self.model_dir = Path(model_dir)
        missing = [name for name in FILES if not (self.model_dir / name).is_file()]
        if missing:
            raise BadArtifact(f"{self.model_dir} lacks {', '.join(missing)}: is it an unpacked model.tar.gz?")
        self.classes: list[str] = self._classes()
        self.preprocess: Preprocess = self._preprocess()
        self.card: dict[str, Any] = self._json("model_card.json", dict)
        self.model_version: str = self._model_version()
        self._request = self._compile(precision).create_infer_request()
        self._check_answers()

    def predict(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] RGB to float32 [N, classes], each row adding up to 1."""
        size = self.preprocess.size
        if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"images are {images.dtype} {images.shape}; the model takes uint8 [N, {size}, {size}, 3]")
        images = np.ascontiguousarray(images)
        probabilities = np.empty((len(images), len(self.classes)), np.float32)
        for index in range(len(images)):
            # One by one: on one thread a batch gains a tenth at most, and each new batch size would be compiled anew.
            self._request.infer([images[index : index + 1]], share_inputs=True)
            probabilities[index] = self._request.get_output_tensor().data[0]
        return probabilities

    def top(self, probabilities: np.ndarray, k: int = 5) -> list[list[dict[str, Any]]]:
        """For each row of [N, classes] its k likeliest classes: [{"class": …, "probability": …}, …]."""
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
        return [
            [{"class": self.classes[index], "probability": round(float(row[index]), 6)} for index in best]
            for row, best in zip(probabilities, order, strict=True)
        ]

    def _json(self, name: str, kind: type) -> Any:
        try:
            value = json.loads((self.model_dir / name).read_bytes())
        except ValueError as error:
            raise BadArtifact(f"{name} is not JSON: {error}") from error
        if not isinstance(value, kind):
            raise BadArtifact(f"{name} holds a {type(value).__name__}; expected a {kind.__name__}")
        return value

    def _classes(self) -> list[str]:
        classes = self._json("classes.json", list)
        if not classes or not all(isinstance(name, str) and name for name in classes):
            raise BadArtifact(f"classes.json must be a list of names; it holds {json.dumps(classes):.200}")
        if len(set(classes)) != len(classes):
            raise BadArtifact(f"classes.json names {max(classes, key=classes.count)!r} more than once")
        return classes

    def _preprocess(self) -> Preprocess:
        try:
            return Preprocess.from_json((self.model_dir / "preprocess.json").read_bytes())
        except (ValueError, TypeError) as error:
            raise BadArtifact(f"preprocess.json: {error}") from error

    def _model_version(self) -> str:
        version = self.card.get("model_version")
        if not isinstance(version, str) or not version:
            raise BadArtifact(f"model_card.json must name the model_version; found {version!r}")
        return version

    def _compile(self, precision: str) -> ov.CompiledModel:
        core = ov.Core()
        try:
            model = core.read_model(self.model_dir / "model.xml")  # model.bin is memory-mapped: processes share it
        except RuntimeError as error:
            raise BadArtifact(f"model.xml with model.bin cannot be read: {str(error).strip()}") from error
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            found = f"{len(model.inputs)} inputs and {len(model.outputs)} outputs"
            raise BadArtifact(f"model.xml must have one input and one output; it has {found}")
        size, width = self.preprocess.size, len(self.classes)
        image, answer = model.input(), model.output()
        if image.element_type != ov.Type.u8 or not _is(image.partial_shape, (None, size, size, 3)):
            found = f"{image.element_type.get_type_name()} {image.partial_shape}"
            raise BadArtifact(f"model.xml takes {found}; preprocess.json makes u8 [N,{size},{size},3]")
        if answer.element_type != ov.Type.f32 or not _is(answer.partial_shape, (None, width)):
            found = f"{answer.element_type.get_type_name()} {answer.partial_shape}"
            raise BadArtifact(f"model.xml answers {found}; classes.json has {width} classes, so f32 [N,{width}]")
        model.reshape([1, size, size, 3])
        settings = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # pinned, two processes would share one core
            "INFERENCE_PRECISION_HINT": precision,
        }
        try:
            return core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise BadArtifact(f"model.xml cannot be compiled for this processor: {str(error).strip()}") from error

    def _check_answers(self) -> None:
        """One answer before the first request: damaged weights show as numbers that are no probabilities."""
        size = self.preprocess.size
        row = self.predict(np.full((1, size, size, 3), 127, np.uint8))[0]
        if not (np.isfinite(row).all() and (row >= 0).all() and abs(float(row.sum()) - 1) < 1e-2):
            raise BadArtifact(f"the model answers no probabilities to a grey picture: {row[:5].tolist()} …")


def _is(shape: ov.PartialShape, expected: tuple[int | None, ...]) -> bool:
    """None: any length, dynamic ones included."""
    if shape.rank.is_dynamic or len(shape) != len(expected):
        return False
    pairs = zip(shape, expected, strict=True)
    return all(want is None or (found.is_static and found.get_length() == want) for found, want in pairs)
