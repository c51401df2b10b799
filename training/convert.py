"""Torch modules as OpenVINO models: how the trained model is served, and how a frozen backbone extracts on a CPU."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    import openvino as ov

# OpenVINO and NNCF report over the network that they are imported and used; without this package they have nothing to
# do so with. It stands here because all that uses them imports this module first.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

EXAMPLES = 2  # pictures that a module is traced with: how many there are decides nothing but how long that takes


@cache
def core() -> ov.Core:
    """The process's only one: two do not get along (see predictor.py)."""
    import openvino as ov

    return ov.Core()


def to_openvino(module: nn.Module, examples: tuple[torch.Tensor, ...], inputs: Any) -> ov.Model:
    """The module in eval mode as an OpenVINO model.

    `examples`: of EXAMPLES pictures, for tracing. `inputs`: as `openvino.convert_model` takes them, with true shapes.
    """
    import openvino as ov

    with torch.no_grad():
        # Traced here, because the converter would trace a second time to compare: what is exported is compared anyway.
        traced = torch.jit.trace(module.eval(), examples, check_trace=False)
        return ov.convert_model(traced, example_input=examples, input=inputs)
