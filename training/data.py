"""The prepared dataset: what prepare.py writes once and every trial reads as its `training` channel.

    prepared/train.npy  validation.npy  test.npy   uint8 [N, side, side, 3] RGB; memory-mapped when read
    prepared/index.json                            labels and sha256 of each split's pictures, in order; those left out
    prepared/classes.json  preprocess.json

`side` is `size` for validation and test: exactly the crops that the server makes. It is `resize` for train: the square
from which random crops are taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from preprocessing import Preprocess

SPLITS = ("train", "validation", "test")


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


def batches(
    split: Split, order: torch.Tensor, batch_size: int, device: torch.device, start: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of `split` in `order`, from batch number `start` on: uint8 [B, side, side, 3] and int64 [B], on `device`.

    The next batch is read (and, for CUDA, pinned and sent) while the caller works on the current one. A last batch of
    one picture joins the one before it: BatchNorm cannot learn from one value per channel.
    """
    chunks = list(order.split(batch_size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]

    def read(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.from_numpy(split.images[indices.numpy()])
        labels = split.labels[indices]
        if device.type == "cuda":
            images = images.pin_memory().to(device, non_blocking=True)
            labels = labels.pin_memory().to(device, non_blocking=True)
        return images, labels

    with ThreadPoolExecutor(1, thread_name_prefix="loader") as loader:
        upcoming = loader.submit(read, chunks[start]) if start < len(chunks) else None
        for number in range(start, len(chunks)):
            assert upcoming is not None
            batch = upcoming.result()
            upcoming = loader.submit(read, chunks[number + 1]) if number + 1 < len(chunks) else None
            yield batch


def batch_count(pictures: int, batch_size: int) -> int:
    """How many batches `batches` yields for this many pictures."""
    count = -(-pictures // batch_size)
    return count - 1 if count > 1 and pictures % batch_size == 1 else count


class Normalise:
    """uint8 [N, H, W, 3] to normalised float32 [N, 3, H, W], channels last."""

    def __init__(self, spec: Preprocess, device: torch.device) -> None:
        self.mean = torch.tensor(spec.mean, device=device) * 255
        self.std = torch.tensor(spec.std, device=device) * 255

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # NHWC in memory seen as NCHW is what channels_last means: nothing is copied
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)


# scale: the least share of the picture's area that a crop keeps; ratio: up to which it is stretched; jitter: of
# contrast and brightness, in standard deviations of the pixels.
AUGMENTATIONS = {
    "none": None,
    "light": {"scale": 0.5, "ratio": 1.22, "jitter": 0.2},
    "strong": {"scale": 0.25, "ratio": 4 / 3, "jitter": 0.4},
}


def augment(images: torch.Tensor, size: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Random resized crops and mirror images of a whole batch at once.

    `images`: normalised float [N, 3, side, side]; gives [N, 3, size, size]. `kind`: a key of AUGMENTATIONS; `none`
    gives the central crop. `generator` (CPU) decides everything, so a step can be repeated exactly.
    """
    settings = AUGMENTATIONS[kind]
    if settings is None:
        margin = round((images.shape[-1] - size) / 2)
        return images[..., margin : margin + size, margin : margin + size]
    count, device = len(images), images.device
    uniform = torch.rand(7, count, generator=generator) * 2 - 1  # -1 to 1
    area = (1 + settings["scale"]) / 2 + uniform[0] * (1 - settings["scale"]) / 2
    ratio = torch.exp(uniform[1] * torch.log(torch.tensor(settings["ratio"])))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = width * uniform[2].sign()
    theta[:, 1, 1] = height
    theta[:, 0, 2] = uniform[3] * (1 - width)
    theta[:, 1, 2] = uniform[4] * (1 - height)
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False).to(device)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    contrast = (1 + uniform[5] * settings["jitter"]).to(device)
    brightness = (uniform[6] * settings["jitter"]).to(device)
    crops = crops * contrast[:, None, None, None] + brightness[:, None, None, None]
    return crops.contiguous(memory_format=torch.channels_last)
