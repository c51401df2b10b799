"""Exports the trained model for serving, in float32 and quantised to int8.

The float32 export is proved to answer as the model does before it is kept. What int8 costs is measured here on a few
pictures, and by the evaluation job on the whole test split, which then chooses what is served.
"""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import artifact
from artifact import TOLERANCE
from batches import EVALUATED, seeded
from convert import EXAMPLES, core, to_openvino
from data import Normalise, Prepared, Split, augment
from preprocessing import Preprocess

# Pictures that the ranges of the activations are taken from. NNCF's default of 300 takes twice as long, and the
# probabilities came no nearer to those of float32 than by a tenth of the distance.
CALIBRATION = 128


CPU = torch.device("cpu")


class ExportError(RuntimeError):
    """The exported model does not answer as the trained one does."""


class Served(nn.Module):
    """What is exported: uint8 [N, size, size, 3] RGB crops to float32 [N, classes] probabilities."""

    def __init__(self, model: nn.Module, spec: Preprocess, device: torch.device = CPU) -> None:
        super().__init__()
        self.model = model.to(device)
        self.normalise = Normalise(spec, device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.normalise(images)).softmax(1)


def write_reference(model: nn.Module, spec: Preprocess, split: Split, device: torch.device, folder: Path) -> None:
    """Keeps what torch answers in float32 to the pictures of `split`: what the evaluation measures each precision by.

    reference.npz: `sha256` str [N], `probabilities` float32 [N, classes].
    """
    served = Served(model, spec, device).eval()
    # Neither autocast nor TF32, in which cuDNN computes convolutions unless told otherwise.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        answers = [
            served(split.read(at).to(device)).cpu().numpy()
            for at in torch.arange(len(split)).split(EVALUATED)
            if len(at)
        ]
    probabilities = np.concatenate(answers) if answers else np.empty((0, 0), np.float32)
    np.savez(folder / artifact.REFERENCE, sha256=np.array(split.sha256, dtype="U64"), probabilities=probabilities)


def export(model: nn.Module, spec: Preprocess, crops: np.ndarray, folder: Path) -> dict[str, float]:
    """Writes model.xml and model.bin, after comparing them with torch on `crops` (uint8 [N, size, size, 3]).

    Returns the comparison for the model card. Raises ExportError when a probability differs by more than TOLERANCE.
    """
    import openvino as ov

    crops = np.array(crops)  # a copy: torch wants memory that may be written to
    served = Served(model.to("cpu", memory_format=torch.contiguous_format), spec).eval()  # type: ignore[call-overload]
    with torch.inference_mode():
        expected = served(torch.from_numpy(crops)).numpy()
    shape = [-1, spec.size, spec.size, 3]
    examples = torch.zeros(EXAMPLES, *shape[1:], dtype=torch.uint8)
    converted = to_openvino(served, (examples,), ("images", shape, ov.Type.u8))
    converted.inputs[0].get_tensor().set_names({"images"})
    converted.outputs[0].get_tensor().set_names({"probabilities"})
    compiled = core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answered = np.concatenate([compiled(crops[i : i + 8])[0] for i in range(0, len(crops), 8)])
    difference = float(np.abs(answered - expected).max())
    print(f"export: OpenVINO and torch differ by at most {difference:.2e} in a probability, on {len(crops)} pictures")
    if not difference <= TOLERANCE:
        raise ExportError(f"the exported model differs from the trained one by {difference:.2e} in a probability; "
                          f"at most {TOLERANCE:.0e} is tolerated. Nothing was written.")  # fmt: skip
    # float32 weights: fp16 compression would halve the file and cost exactness that the check above vouches for
    ov.save_model(converted, folder / "model.xml", compress_to_fp16=False)
    return {"max_difference": difference, "tolerance": TOLERANCE, "pictures": len(crops)}


def calibration(prepared: Prepared, seed: int) -> np.ndarray:
    """Training pictures, cut as the server cuts them: uint8 [CALIBRATION or fewer, size, size, 3]."""
    at = torch.randperm(len(prepared.train), generator=seeded(seed))[:CALIBRATION]
    crops, _ = augment(prepared.train.read(at), prepared.preprocess.size, "none", torch.empty(0))
    return crops.contiguous().numpy()


def quantise(folder: Path, calibration: np.ndarray, crops: np.ndarray) -> dict[str, Any]:
    """Writes int8/model.xml and int8/model.bin, made of the model.xml of `folder`, and compares the two on `crops`.

    `calibration` and `crops`: uint8 [N, size, size, 3]. Returns the comparison for the model card. Raises ImportError
    where NNCF is not installed, and ExportError when what comes out answers no probabilities.
    """
    import nncf  # after convert, which keeps it from reporting over the network
    import openvino as ov

    begun = time.perf_counter()
    exact = core().read_model(folder / artifact.SERVING)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars, which a log shows as a pile of lines
        # One by one, because the ranges of the activations are averaged over what is given at once. By NNCF's defaults
        # weights get a scale for each output channel, and activations a symmetric one for each tensor; asymmetric ones
        # came out no more exact, and a tenth slower.
        pictures = nncf.Dataset([picture[None] for picture in calibration])
        quantised = nncf.quantize(exact, pictures, subset_size=len(calibration))
    answers = []
    for model in (exact, quantised):
        compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answers.append(np.concatenate([compiled(crops[i : i + 8])[0] for i in range(0, len(crops), 8)]))
    if not np.isfinite(answers[1]).all():
        raise ExportError("the model quantised to int8 answers no probabilities")
    (folder / artifact.INT8).parent.mkdir(exist_ok=True)
    ov.save_model(quantised, folder / artifact.INT8, compress_to_fp16=False)
    difference = float(np.abs(answers[1] - answers[0]).max())
    agreement = float((answers[0].argmax(1) == answers[1].argmax(1)).mean())
    print(f"int8: quantised on {len(calibration)} pictures in {time.perf_counter() - begun:.1f} s; differs by at most "
          f"{difference:.3f} in a probability on {len(crops)} others, same label for {agreement:.0%}")  # fmt: skip
    return {"calibration": len(calibration), "max_difference": difference, "agreement": agreement,
            "pictures": len(crops)}  # fmt: skip
