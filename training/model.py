"""The model, defined once: torchvision's ResNet-18 with a fresh `fc` for the classes at hand."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from torchvision.models import ResNet

FEATURES = 512  # width of what `fc` reads


_libraries: list[torch.library.Library] = []


class WeightsError(ValueError):
    """The pretrained weights cannot be used. The text says why and what to do."""


@cache
def _import_resnet18():
    """torchvision's resnet18; also where a CUDA build of torchvision meets a CPU build of torch.

    The registry's torchvision wheel is built for CUDA. Beside a CPU torch its C++ library cannot be loaded, and then
    `import torchvision` fails on registering fakes for two operators that don't exist. ResNet uses neither, so they are
    declared, and only when the library really cannot be loaded.
    """
    from importlib.util import find_spec

    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchvision is not installed: pip install torchvision==0.28.0")
    library = Path(spec.origin).parent / "_C.so"
    if library.exists():
        try:
            torch.ops.load_library(library)
        except OSError:
            operators = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(operators)  # what it declares is gone with it
    from torchvision.models.resnet import resnet18

    return resnet18


def build(classes: int, weights: Path | None = None) -> ResNet:
    """ResNet-18 for `classes` classes: [N, 3, S, S] normalised pictures to [N, classes] logits, S of 32 or more.

    `weights`: a state dict file of ImageNet's resnet18; the backbone starts from it. Without it, it starts from random
    weights (torch's global generator). Raises WeightsError.
    """
    model = _import_resnet18()(weights=None)
    if weights is not None:
        load_pretrained(model, weights)
    else:
        gabor_stem(model.conv1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.3  # weights move fast and steps are few: statistics must keep up with them
    model.fc = nn.Linear(FEATURES, classes)
    return model


def gabor_stem(conv: nn.Conv2d) -> None:
    """Starts the first layer from random Gabor filters and colour blobs, which is what it learns to be on any pictures.

    A few hundred pictures don't teach it that in a few epochs, so without pretrained weights this is worth several
    points of accuracy. The scale is Kaiming's (fan out), as everywhere else in the network.
    """
    count, channels, height, width = conv.weight.shape
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    angle, frequency, phase, spread = (values[:, None, None] for values in torch.rand(4, count))
    envelope = torch.exp(-(x**2 + y**2) / (2 * (1.2 + 1.5 * spread) ** 2))
    along = x * torch.cos(math.pi * angle) + y * torch.sin(math.pi * angle)
    waves = envelope * torch.cos(2 * math.pi * ((0.08 + 0.3 * frequency) * along + phase))
    waves -= waves.mean((1, 2), keepdim=True)
    shape = torch.where(torch.arange(count)[:, None, None] % 4 == 0, envelope, waves)
    colour = torch.where(torch.arange(count)[:, None] % 2 == 0, torch.randn(count, channels), torch.ones(()))
    filters = shape[:, None] * colour[:, :, None, None]
    with torch.no_grad():
        conv.weight.copy_(filters * math.sqrt(2 / (count * height * width)) / filters.std())


def find_weights(folder: Path) -> Path | None:
    """The one file of the weights channel; None where the job has no such channel. Raises WeightsError."""
    files = sorted(folder.glob("*.pth")) if folder.is_dir() else []
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise WeightsError(f"the weights channel must hold one .pth file, not {len(files)}: {names}")
    return files[0] if files else None


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Loads a torchvision state dict (1,000 ImageNet classes included) into `model`. Raises WeightsError."""
    check_sha256(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any layer: zip, pickle, storage
        raise WeightsError(f"{path.name} is not a state dict that torch can load ({error}); fetch it again") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path.name} holds a {type(state).__name__}, not the state dict of a ResNet-18")
    check_state(state, model.state_dict(), path.name, "use resnet18-f37072fd.pth")
    model.load_state_dict(state, strict=False)


def check_state(state: dict, expected: dict, source: str, advice: str) -> None:
    """WeightsError where `state`, which is of `source`, has other tensors than `expected`."""
    # BatchNorm's counters are missing in old files, and of no use in them.
    missing = sorted(name for name in expected.keys() - state.keys() if not name.endswith("num_batches_tracked"))
    unexpected = sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if missing or unexpected or shapes:
        problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
        found = "; ".join(f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in problems if names)
        raise WeightsError(f"{source} does not match torchvision's resnet18: {found}; {advice}")


def check_sha256(path: Path) -> None:
    """torch hub names a file with the first 8 digits of its sha256, `resnet18-f37072fd.pth`: checks them."""
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named is None:
        return
    found = sha256(path)
    if not found.startswith(named[1]):
        raise WeightsError(
            f"{path.name} is damaged: its sha256 starts with {found[:8]}, not {named[1]}; fetch it again"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_trainable(model: ResNet, unfreeze: str) -> None:
    """`none`: `fc` alone; `layer4`: the last stage and `fc`; `all`: everything."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = (
            unfreeze == "all" or name.startswith("fc.") or (unfreeze == "layer4" and name.startswith("layer4."))
        )


def train_mode(model: ResNet) -> None:
    """Training mode, except that frozen BatchNorm layers keep the statistics that their frozen weights belong to."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for the optimizer: decay on matrices and kernels, none on biases and BatchNorm."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def fold_batchnorm(module: nn.Module) -> None:
    """Puts BatchNorm's factors into the convolutions before it: a frozen network computes the same, faster."""
    for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):  # the last: a shortcut's
        before, after = getattr(module, conv, None), getattr(module, norm, None)
        if isinstance(before, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
            setattr(module, conv, fuse_conv_bn_eval(before, after))
            setattr(module, norm, nn.Identity())
    for child in module.children():
        fold_batchnorm(child)


def features(model: ResNet, images: torch.Tensor) -> torch.Tensor:
    """What `fc` reads: [N, 3, S, S] to [N, 512]."""
    for stage in _backbone(model):
        images = stage(images)
    return images.flatten(1)


def _backbone(model: ResNet) -> Iterator[nn.Module]:
    return (module for name, module in model.named_children() if name != "fc")
