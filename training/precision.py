"""In what numbers the convolutions compute on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def half(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The 16-bit type that the device computes in natively: bfloat16, or float16 on older GPUs.

    None where neither is fast, and where `precision` is `float32`.
    """
    if precision == "float32":
        return None
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else None  # tensor cores came with 7.0
    fast = torch.cpu.get_capabilities()
    return torch.bfloat16 if fast.get("avx512_bf16") or fast.get("amx_bf16") or fast.get("bf16") else None


class Precision:
    """Autocast to `half`, and the scaling of the loss that float16's small range asks for.

    The scale starts low and never grows: ResNet-18's gradients fit, and torch's default would begin with steps that
    overflow, which the rules would take for an explosion. Where a step overflows all the same, the scale is halved and
    the step left out.
    """

    def __init__(self, device: torch.device, precision: str = "auto") -> None:
        self.device, self.dtype = device, half(device, precision)
        scaled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2**31 - 1, enabled=scaled)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()
