"""A model artifact, ready to answer: used by the server and, in the same container, by the evaluation job.

OpenVINO runs the exported model on one thread; whoever wants more cores starts more processes.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# OpenVINO reports over the network that it was imported; without this package it has nothing to do so with.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino as ov  # noqa: E402

from preprocessing import Preprocess  # noqa: E402

PRECISIONS = ("f32", "bf16", "int8")  # the most exact first
FILES = ("model.xml", "model.bin", "classes.json", "preprocess.json", "model_card.json")


@cache
def core() -> ov.Core:
    """The process's only one.

    On processors with AMX each gives the thread an alternate signal stack, and puts back the one it found when it goes.
    Where two go in the order they came in, the second puts back one that is freed: the next signal ends the process.
    """
    return ov.Core()


class BadArtifact(Exception):
    """The model directory is incomplete, damaged, or its parts do not belong together."""


def obstacle(model_dir: Path, precision: str) -> str:
    """What speaks against serving the model of `model_dir` in `precision` on this machine; empty where nothing does.

    Without int8's files it is impossible. A processor without bf16 answers all the same, from float32 or slower.
    """
    if precision == "int8" and not all((model_dir / name).is_file() for name in ("int8/model.xml", "int8/model.bin")):
        return "the artifact has no int8/model.xml with model.bin: it was exported without int8"
    if precision == "bf16" and "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this processor does not compute in bf16"
    return ""


def drop_pages(file: Path) -> None:
    """Let go of what this process read of a memory-mapped file: it comes back from the page cache when it is wanted.

    A compiled model has weights of its own, ordered for the processor, and OpenVINO keeps the file mapped beside them:
    as much memory again. Elsewhere than on Linux nothing happens.
    """
    maps, path = Path("/proc/self/maps"), str(file.resolve())
    if not maps.exists():
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in maps.read_text(errors="replace").splitlines():
        addresses, access, *_, name = line.split(maxsplit=5)
        if name == path and "w" not in access:  # what was written would be lost
            begin, end = (int(address, 16) for address in addresses.split("-"))
            madvise(begin, end - begin, mmap.MADV_DONTNEED)


class Predictor:
    """The model of `model_dir`. BadArtifact with the reason when it cannot serve. Not for two threads at once."""

    def __init__(self, model_dir: str | Path, precision: str = "f32") -> None:
        """`precision`: `f32`, `bf16` (what OpenVINO may compute in) or `int8` (the quantised model)."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; it must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}")
        self.model_dir = Path(model_dir)
        missing = [name for name in FILES if not (self.model_dir / name).is_file()]
        if missing:
            raise BadArtifact(f"{self.model_dir} lacks {', '.join(missing)}: is it an unpacked model.tar.gz?")
        if precision == "int8" and (reason := obstacle(self.model_dir, precision)):
            raise BadArtifact(f"{self.model_dir}: {reason}; serve it in f32 or bf16, or export it again")
        self.precision = precision
        self.classes: list[str] = self._classes()
        self.preprocess: Preprocess = self._preprocess()
        self.card: dict[str, Any] = self._json("model_card.json", dict)
        self.model_version: str = self._model_version()
        file = self.model_dir / ("int8/model.xml" if precision == "int8" else "model.xml")
        self._request = self._compile(file).create_infer_request()
        self._check_answers()
        drop_pages(file.with_suffix(".bin"))

    def predict(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] RGB to float32 [N, classes], each row adding up to 1."""
        size = self.preprocess.size
        if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"images are {images.dtype} {images.shape}; the model takes uint8 [N, {size}, {size}, 3]")
        images = np.ascontiguousarray(images)
        probabilities = np.empty((len(images), len(self.classes)), np.float32)
        for index in range(len(images)):
            # One by one: on one thread a batch gains a tenth at most, and the model for it takes half as much memory
            # again. And so an answer never depends on what came with a picture.
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

    def _compile(self, file: Path) -> ov.CompiledModel:
        name = file.relative_to(self.model_dir)
        try:
            model = core().read_model(file)  # model.bin is memory-mapped: processes share it
        except RuntimeError as error:
            raise BadArtifact(f"{name} with model.bin cannot be read: {str(error).strip()}") from error
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            found = f"{len(model.inputs)} inputs and {len(model.outputs)} outputs"
            raise BadArtifact(f"{name} must have one input and one output; it has {found}")
        size, width = self.preprocess.size, len(self.classes)
        image, answer = model.input(), model.output()
        if image.element_type != ov.Type.u8 or not _is(image.partial_shape, (None, size, size, 3)):
            found = f"{image.element_type.get_type_name()} {image.partial_shape}"
            raise BadArtifact(f"{name} takes {found}; preprocess.json makes u8 [N,{size},{size},3]")
        if answer.element_type != ov.Type.f32 or not _is(answer.partial_shape, (None, width)):
            found = f"{answer.element_type.get_type_name()} {answer.partial_shape}"
            raise BadArtifact(f"{name} answers {found}; classes.json has {width} classes, so f32 [N,{width}]")
        settings = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # pinned, two processes would share one core
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
        }
        try:
            model.reshape([1, size, size, 3])
            return core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise BadArtifact(f"{name} cannot be compiled for this processor: {str(error).strip()}") from error

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
