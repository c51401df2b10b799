"""The prepared dataset: what prepare.py writes once and every trial reads as its `training` channel.

    prepared/train.npy  validation.npy  test.npy   uint8 [N, side, side, 3] RGB; memory-mapped when read
    prepared/index.json                            labels and sha256 of each split's pictures, in order; those left out
    prepared/classes.json  preprocess.json
    prepared/features.npz                          where the backbone is frozen: what it makes of them (see features.py)

`side` is `size` for validation and test: exactly the crops that the server makes. It is `resize` for train: the square
from which random crops are taken.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from artifact import SPLITS
from preprocessing import Preprocess

T = TypeVar("T")


class DataError(ValueError):
    """The training data cannot be used. The text says why and what to do."""


@dataclass(frozen=True)
class Split:
    """`images` uint8 [N, side, side, 3]; `labels` int64 [N], indices into the classes; `sha256` names the pictures."""

    images: np.ndarray
    labels: torch.Tensor
    sha256: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, at: torch.Tensor) -> torch.Tensor:
        """The pictures at these indices, uint8 [B, side, side, 3], in memory of their own."""
        return torch.from_numpy(self.images[at.numpy()])


@dataclass(frozen=True)
class Prepared:
    train: Split
    validation: Split
    test: Split
    classes: list[str]
    preprocess: Preprocess
    skipped: list[dict] = field(default_factory=list)  # sha256, origin, reason


def load(folder: Path) -> Prepared:
    """Opens a prepared dataset; the pictures stay on disk until they are read. Raises DataError."""
    if not (folder / "index.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise DataError(f"the training channel {folder} holds no prepared dataset (found: {found or 'nothing'}); "
                        "give it the output of prepare.py")  # fmt: skip
    index = json.loads((folder / "index.json").read_text())
    splits = {}
    for name in SPLITS:
        images = np.load(folder / f"{name}.npy", mmap_mode="r")
        rows = index["splits"][name]
        if len(images) != len(rows["labels"]):
            raise DataError(f"{name}.npy holds {len(images)} pictures and index.json {len(rows['labels'])}: "
                            "the channel mixes two datasets, prepare it again")  # fmt: skip
        splits[name] = Split(images, torch.tensor(rows["labels"], dtype=torch.int64), rows["sha256"])
    classes = json.loads((folder / "classes.json").read_text())
    preprocess = Preprocess.from_json((folder / "preprocess.json").read_text())
    return Prepared(**splits, classes=classes, preprocess=preprocess, skipped=index["skipped"])


def chunks(order: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """`order` in as many batches as `batch_size` asks for, of one size or of two that differ by one.

    A few pictures left over for a last batch would each weigh several times as much as the others, and their means and
    variances would be what BatchNorm learns last before an epoch is judged. No batch has one picture, unless there is
    but one: BatchNorm cannot learn from one value per channel.
    """
    count = min(math.ceil(len(order) / batch_size), len(order) // 2)
    return list(order.tensor_split(max(1, count)))


def prefetch(read: Callable[[int], T], numbers: range, workers: int) -> Iterator[T]:
    """`read(number)` for each of `numbers`, in order; `workers` threads stay that many and one ahead of the caller."""
    waiting: deque[Future[T]] = deque()
    loader = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    try:
        for number in numbers:
            waiting.append(loader.submit(read, number))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        loader.shutdown(cancel_futures=True)


class Normalise:
    """uint8 [N, H, W, 3] to normalised float32 [N, 3, H, W], channels last; `light` is what `augment` gives."""

    def __init__(self, spec: Preprocess, device: torch.device) -> None:
        mean, std = (torch.tensor(values, device=device) for values in (spec.mean, spec.std))
        self.scale, self.offset = 1 / (255 * std), -mean / std

    def __call__(self, images: torch.Tensor, light: torch.Tensor | None = None) -> torch.Tensor:
        scale, offset = self.scale, self.offset
        if light is not None:
            contrast, brightness = light[0, :, None, None, None], light[1, :, None, None, None]
            scale, offset = scale * contrast, offset * contrast + brightness
        # NHWC in memory seen as NCHW is what channels_last means: nothing is copied
        return torch.addcmul(offset, images.float(), scale).permute(0, 3, 1, 2)


# scale: the least share of the picture's area that a crop keeps; ratio: up to which it is stretched; jitter: of
# contrast and brightness, in standard deviations of the pixels.
AUGMENTATIONS = {
    "none": None,
    "light": {"scale": 0.5, "ratio": 1.22, "jitter": 0.2},
    "strong": {"scale": 0.25, "ratio": 4 / 3, "jitter": 0.4},
}
CHANCES = 7  # numbers that decide one picture's augmentation


def augment(
    images: torch.Tensor, size: int, kind: str, chances: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random resized crops and mirror images: uint8 [N, side, side, 3] to uint8 [N, size, size, 3], on the CPU.

    `kind`: a key of AUGMENTATIONS; `none` gives the central crop. `chances` (float [CHANCES, N], 0 to 1) decides
    everything, so that a step can be repeated exactly. The second value is the change of light, which costs nothing
    when Normalise does it: float [2, N], contrast (a factor) and brightness (in standard deviations); None for none.
    """
    settings = AUGMENTATIONS[kind]
    side = images.shape[1]
    if settings is None:
        margin = round((side - size) / 2)
        return images[:, margin : margin + size, margin : margin + size], None
    uniform = chances * 2 - 1
    area = (1 + settings["scale"]) / 2 + uniform[0] * (1 - settings["scale"]) / 2
    ratio = torch.exp(uniform[1] * math.log(settings["ratio"]))
    width = ((area * ratio).sqrt() * side).round().clamp(1, side).long()
    height = ((area / ratio).sqrt() * side).round().clamp(1, side).long()
    left = (chances[2] * (side - width + 1)).long().clamp(max=side - width)
    top = (chances[3] * (side - height + 1)).long().clamp(max=side - height)
    crops = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
    planes, target = images.permute(0, 3, 1, 2), crops.permute(0, 3, 1, 2)
    for n, (x, y, w, h) in enumerate(torch.stack([left, top, width, height], 1).tolist()):
        # on uint8 with channels last, torch resizes with vector instructions: 15 times as fast as grid_sample
        part = planes[n : n + 1, :, y : y + h, x : x + w]
        target[n] = F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]
    mirrored = uniform[4] < 0
    crops[mirrored] = crops[mirrored].flip(2)
    return crops, torch.stack([1 + uniform[5] * settings["jitter"], uniform[6] * settings["jitter"]])
