"""Exports the trained model for serving, and proves that the export answers as the model does before it is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from convert import EXAMPLES, to_openvino
from data import Normalise
from preprocessing import Preprocess

# Largest difference of a probability between torch in float32 and the exported model. The IR holds float32, but the CPU
# plugin may fold and reorder; where the comparison itself runs in bfloat16 a model would be refused for no fault.
TOLERANCE = 1e-3


class ExportError(RuntimeError):
    """The exported model does not answer as the trained one does."""


class Served(nn.Module):
    """What is exported: uint8 [N, size, size, 3] RGB crops to float32 [N, classes] probabilities."""

    def __init__(self, model: nn.Module, spec: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.normalise = Normalise(spec, torch.device("cpu"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.normalise(images)).softmax(1)


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
    compiled = ov.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answered = np.concatenate([compiled(crops[i : i + 8])[0] for i in range(0, len(crops), 8)])
    difference = float(np.abs(answered - expected).max())
    print(f"export: OpenVINO and torch differ by at most {difference:.2e} in a probability, on {len(crops)} pictures")
    if not difference <= TOLERANCE:
        raise ExportError(f"the exported model differs from the trained one by {difference:.2e} in a probability; "
                          f"at most {TOLERANCE:.0e} is tolerated. Nothing was written.")  # fmt: skip
    # float32 weights: fp16 compression would halve the file and cost exactness that the check above vouches for
    ov.save_model(converted, folder / "model.xml", compress_to_fp16=False)
    return {"max_difference": difference, "tolerance": TOLERANCE, "pictures": len(crops)}
