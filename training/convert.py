"""Torch modules as OpenVINO models: how the trained model is served, and how a frozen backbone extracts on a CPU."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    import openvino as ov

EXAMPLES = 2  # pictures that a module is traced with: how many there are decides nothing but how long that takes


def to_openvino(module: nn.Module, examples: tuple[torch.Tensor, ...], inputs: Any) -> ov.Model:
    """The module in eval mode as an OpenVINO model.

    `examples`: of EXAMPLES pictures, for tracing. `inputs`: as `openvino.convert_model` takes them, with true shapes.
    """
    # The converter would report its use over the network; without this package it has nothing to do so with.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino as ov

    with torch.no_grad():
        # Traced here, because the converter would trace a second time to compare: what is exported is compared anyway.
        traced = torch.jit.trace(module.eval(), examples, check_trace=False)
        return ov.convert_model(traced, example_input=examples, input=inputs)
