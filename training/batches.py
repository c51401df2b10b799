"""Where training gets its batches: pictures for convolutions, or the features that a frozen backbone makes of them.

Both have `steps_per_epoch`, `train(epoch, start)`, which goes on from any batch of any epoch, `evaluation(split)`, and
`sample(epoch)`: inputs of train as they are evaluated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch

import data
from data import Split

EVALUATED = 64  # pictures at once; nothing is learnt from them, so it is only a matter of memory
SAMPLE = 256  # pictures whose statistics stand for all: some 12,000 values of a channel where it has fewest


def seeded(*numbers: int) -> torch.Generator:
    """A generator that depends on the numbers alone (seed, epoch, step), so that any step can be repeated."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


class Pictures:
    """Batches of augmented pictures, for training convolutions.

    Reading, cropping, pinning and sending a batch, and its normalisation, are done ahead of the training step by
    `loader_workers` threads; torch leaves Python's lock while it computes.
    """

    def __init__(self, prepared: data.Prepared, options: argparse.Namespace, device: torch.device) -> None:
        self.split, self.options, self.device = prepared.train, options, device
        self.normalise = data.Normalise(prepared.preprocess, device)
        self.steps_per_epoch = len(data.chunks(torch.arange(len(self.split)), options.batch_size))

    def train(self, epoch: int, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        options = self.options
        chunks = data.chunks(torch.randperm(len(self.split), generator=seeded(options.seed, epoch)), options.batch_size)

        def read(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            at = chunks[step]
            chances = torch.rand(data.CHANCES, len(at), generator=seeded(options.seed, epoch, step + 1))
            images, light = data.augment(self.split.read(at), options.image_size, options.augmentation, chances)
            inputs = self.normalise(self.send(images), None if light is None else self.send(light))
            return inputs, self.send(self.split.labels[at])

        yield from data.prefetch(read, range(start, len(chunks)), options.loader_workers)

    def evaluation(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        chunks = torch.arange(len(split)).split(EVALUATED) if len(split) else ()

        def read(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            at = chunks[number]
            return self.normalise(self.send(split.read(at))), self.send(split.labels[at])

        yield from data.prefetch(read, range(len(chunks)), self.options.loader_workers)

    def sample(self, epoch: int) -> Iterator[torch.Tensor]:
        """Some training pictures, other ones in each epoch, in the central crop."""
        options = self.options
        order = torch.randperm(len(self.split), generator=seeded(options.seed, epoch))[:SAMPLE]
        for at in data.chunks(order, EVALUATED):
            images, _ = data.augment(self.split.read(at), options.image_size, "none", torch.empty(0))
            yield self.normalise(self.send(images))

    def send(self, batch: torch.Tensor) -> torch.Tensor:
        """To the device; from pinned memory, which CUDA copies while it computes."""
        if self.device.type != "cuda":
            return batch
        return batch.pin_memory().to(self.device, non_blocking=True)


class Features:
    """Batches of a frozen backbone's features: each picture, in several augmented views, went through it once.

    `features`: by split; of train float32 [views, N, FEATURES], of the others [N, FEATURES].
    """

    def __init__(
        self, prepared: data.Prepared, options: argparse.Namespace, device: torch.device,
        features: dict[str, np.ndarray],
    ) -> None:  # fmt: skip
        self.options = options
        self.labels = prepared.train.labels.to(device)
        self.views = torch.from_numpy(features["train"]).to(device)
        chunks = data.chunks(torch.arange(len(self.labels)), options.batch_size)
        self.slices = [slice(int(at[0]), int(at[-1]) + 1) for at in chunks]
        self.steps_per_epoch = len(self.slices)
        self.splits = {
            id(split): (torch.from_numpy(features[name]).to(device), split.labels.to(device))
            for name, split in (("validation", prepared.validation), ("test", prepared.test))
        }

    def train(self, epoch: int, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = seeded(self.options.seed, epoch)
        count, device = len(self.labels), self.labels.device
        order = torch.randperm(count, generator=generator).to(device)
        view = torch.randint(len(self.views), (count,), generator=generator).to(device)
        inputs, labels = self.views[view[order], order], self.labels[order]  # one gather an epoch, not one a step
        for at in self.slices[start:]:
            yield inputs[at], labels[at]

    def evaluation(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if len(split):
            yield self.splits[id(split)]

    def sample(self, epoch: int) -> Iterator[torch.Tensor]:
        """Nothing: a head has no BatchNorm."""
        return iter(())
