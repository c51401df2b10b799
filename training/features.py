"""What a frozen backbone makes of the pictures, extracted once: by the prepare job for all, else by the training.

    prepared/features.npz    train float32 [views, N, 512]; validation and test [N, 512]; made_of: JSON text

The first view of a training picture is its centre, as the server sees it, the others are augmented. A picture's
features depend on the picture and on `made_of` alone, so they can be copied from an earlier preparation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

import data
import model as models
from artifact import SPLITS
from batches import seeded
from convert import EXAMPLES, core, to_openvino
from precision import half
from prepare import code_version, cores

FILE = "features.npz"
BATCH = 32  # always so many: what a kernel computes for a picture may depend on how many come with it
# Pixels from which on OpenVINO is the faster engine on a CPU with bfloat16: it extracts twice as fast as torch, but
# takes a second or two to convert and compile the network.
WORTH_OPENVINO = 500 * 224 * 224

Arrays = dict[str, np.ndarray]
Compute = Callable[[torch.Tensor, torch.Tensor], np.ndarray]  # uint8 [BATCH, S, S, 3], float [2, BATCH] to [BATCH, 512]


def of(
    prepared: data.Prepared, options: argparse.Namespace, device: torch.device, weights: Path, sha256: str
) -> Arrays:
    """The features of a training channel: those of the prepare job where they fit the options, else extracted here."""
    models.check_sha256(weights)
    arrays = load(options.training, settings(options, prepared, sha256), prepared)
    if arrays is None:
        backbone = models.build(1, weights)
        arrays, _ = extract(backbone, prepared, options, device, choose_engine(prepared, options, device))
    return arrays


def settings(options: argparse.Namespace, prepared: data.Prepared, weights: str) -> dict[str, Any]:
    """What features must have been made with to be of use for these options. `weights`: sha256 of the file."""
    return {
        "weights": weights,
        "preprocess": prepared.preprocess.to_json(),
        "views": options.views,
        # one view is the plain centre, whatever else is set
        "augmentation": options.augmentation if options.views > 1 else "none",
        "seed": options.seed if options.views > 1 else 0,
        "precision": options.precision,
    }


def load(folder: Path, wanted: dict[str, Any], prepared: data.Prepared) -> Arrays | None:
    """The features in a prepared dataset; None where there are none, or others than those wanted."""
    if not (folder / FILE).is_file():
        return None
    with np.load(folder / FILE) as file:
        made_of = json.loads(str(file["made_of"]))
        if differs := [name for name in wanted if made_of["settings"].get(name) != wanted[name]]:
            print(f"features: those in the training channel are not used, made with other {', '.join(differs)}")
            return None
        arrays = {name: file[name] for name in SPLITS}
    counts = {name: arrays[name].shape[-2] for name in SPLITS}
    if counts != {name: len(getattr(prepared, name)) for name in SPLITS}:
        raise data.DataError(f"{FILE} is of {counts} pictures, index.json of others: prepare the dataset again")
    return arrays


def write(folder: Path, options: argparse.Namespace, prepared: data.Prepared, previous: Path | None) -> str:
    """Extracts the features of a prepared dataset into its folder; says what was done. Raises WeightsError.

    `previous`: an earlier prepared dataset, whose features are copied where they would come out the same.
    """
    weights = models.find_weights(options.weights)
    if weights is None:
        return "no weights channel"
    backbone, cpu = models.build(1, weights), torch.device("cpu")
    wanted = settings(options, prepared, models.sha256(weights))
    engine = choose_engine(prepared, options, cpu)
    made_of = json.dumps(
        {"settings": wanted, "engine": engine, "source": source_hash(), "crops": code_version()}, sort_keys=True
    )
    known = read_known(previous, made_of) if previous and (previous / FILE).is_file() else {}
    arrays, copied = extract(backbone, prepared, options, cpu, engine, known)
    np.savez(folder / FILE, **arrays, made_of=np.array(made_of))  # type: ignore[arg-type]  # numpy's stub
    return f"{sum(array.size // models.FEATURES for array in arrays.values())} by {engine}, {copied} of them copied"


def source_hash() -> str:
    """Of the code that decides what the backbone makes of a crop."""
    here = Path(__file__).parent
    names = ("batches", "convert", "data", "features", "model")
    return hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in names)).hexdigest()


def read_known(previous: Path, made_of: str) -> dict[tuple[str, str], np.ndarray]:
    """Features of an earlier preparation by kind (train, or plain for the other splits) and sha256: [views, 512]."""
    try:
        index = json.loads((previous / "index.json").read_text())["splits"]
        with np.load(previous / FILE) as file:
            if str(file["made_of"]) != made_of:
                return {}
            found = {}
            for name in SPLITS:
                views = file[name] if name == "train" else file[name][None]
                for row, sha256 in enumerate(index[name]["sha256"]):
                    found[kind(name), sha256] = views[:, row]
            return found
    except (OSError, ValueError, KeyError, IndexError, BadZipFile) as error:
        print(f"features: the previous ones cannot be read ({error}); extracting all", flush=True)
        return {}


def kind(split: str) -> str:
    return "train" if split == "train" else "plain"


# Extraction ----------------------------------------------------------------------------------------------------------


def extract(
    backbone: nn.Module, prepared: data.Prepared, options: argparse.Namespace, device: torch.device, engine: str,
    known: dict[tuple[str, str], np.ndarray] | None = None,
) -> tuple[Arrays, int]:  # fmt: skip
    """Features by split, and how many rows of them were taken from `known`."""
    size, known = prepared.preprocess.size, known or {}
    dtype = half(device, options.precision) or torch.float32
    make = with_openvino if engine.startswith("openvino") else with_torch
    compute = make(Backbone(backbone, prepared, device, dtype), prepared.preprocess.size, device)
    arrays, copied = {}, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the batches are what runs in parallel: threads within one would wait for each other
    try:
        for name in SPLITS:
            split: data.Split = getattr(prepared, name)
            views = options.views if name == "train" else 1
            array = np.zeros((views, len(split), models.FEATURES), np.float32)
            new = []
            for row, sha256 in enumerate(split.sha256):
                if (kind(name), sha256) in known:
                    array[:, row] = known[kind(name), sha256]
                else:
                    new.append(row)
            copied += views * (len(split) - len(new))
            for view in range(views):
                run(compute, split, new, "none" if view == 0 else options.augmentation, size, options.seed, view, array)
            arrays[name] = array if name == "train" else array[0]
    finally:
        torch.set_num_threads(threads)
    return arrays, copied


def run(
    compute: Compute, split: data.Split, rows: list[int], kind: str, size: int, seed: int, view: int, into: np.ndarray
) -> None:
    """Fills the `rows` of one view of a split."""
    batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]

    def read(number: int) -> np.ndarray:
        at = batches[number] + batches[number][-1:] * (BATCH - len(batches[number]))
        # by the picture, not by its place: the same wherever it stands in whatever dataset
        chances = [
            torch.rand(data.CHANCES, generator=seeded(seed, view, int(split.sha256[row][:15], 16))) for row in at
        ]
        images, light = data.augment(split.read(torch.tensor(at)), size, kind, torch.stack(chances, 1))
        return compute(images, torch.stack([torch.ones(BATCH), torch.zeros(BATCH)]) if light is None else light)

    for number, found in enumerate(data.prefetch(read, range(len(batches)), cores())):
        into[view, batches[number]] = found[: len(batches[number])]


class Backbone(nn.Module):
    """uint8 [N, S, S, 3] and the change of light [2, N] to features [N, 512]; `dtype` is what is computed in."""

    def __init__(self, model: nn.Module, prepared: data.Prepared, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.normalise, self.dtype = model.eval(), data.Normalise(prepared.preprocess, device), dtype

    def forward(self, images: torch.Tensor, light: torch.Tensor) -> torch.Tensor:
        inputs = self.normalise(images, light).to(next(self.model.parameters()).dtype)
        return models.features(self.model, inputs)


def choose_engine(prepared: data.Prepared, options: argparse.Namespace, device: torch.device) -> str:
    """What extracts, with version and precision: on a CPU OpenVINO, where it is installed and there is enough to do."""
    passes = options.views * len(prepared.train) + len(prepared.validation) + len(prepared.test)
    much = passes * prepared.preprocess.size**2 >= WORTH_OPENVINO
    engine = f"torch {torch.__version__}"
    if device.type == "cpu" and much and find_spec("openvino"):
        engine = f"openvino {version('openvino')}"
    return f"{engine} {half(device, options.precision) or torch.float32}"


def with_torch(backbone: Backbone, size: int, device: torch.device) -> Compute:
    """The backbone with its BatchNorm folded into the convolutions."""
    models.fold_batchnorm(backbone.model)
    backbone.model.to(device, backbone.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compute(images: torch.Tensor, light: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return backbone(images.to(device), light.to(device)).float().cpu().numpy()

    return compute


def with_openvino(backbone: Backbone, size: int, device: torch.device) -> Compute:
    """The same as an OpenVINO model, with a stream for each core."""
    import openvino as ov

    examples = torch.zeros(EXAMPLES, size, size, 3, dtype=torch.uint8), torch.ones(2, EXAMPLES)
    inputs = [([BATCH, size, size, 3], ov.Type.u8), ([2, BATCH], ov.Type.f32)]
    converted = to_openvino(backbone, examples, inputs)
    compiled = core().compile_model(converted, "CPU", {
        "INFERENCE_PRECISION_HINT": "bf16" if backbone.dtype == torch.bfloat16 else "f32",
        "NUM_STREAMS": cores(), "INFERENCE_NUM_THREADS": cores(), "ENABLE_CPU_PINNING": False,
    })  # fmt: skip
    own = threading.local()

    def compute(images: torch.Tensor, light: torch.Tensor) -> np.ndarray:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        return own.request.infer([images.contiguous().numpy(), light.numpy()])[0].copy()

    return compute
