"""Where training gets its batches: pictures for convolutions, or the features that a frozen backbone makes of them.

Both have `steps_per_epoch`, `train(epoch, start)`, which goes on from any batch of any epoch, and `evaluation(split)`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch

import data
from model import features


def seeded(*numbers: int):
    """A generator that depends on the numbers alone (seed, epoch, step), so that any step can be repeated."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


class Pictures:
    """Batches of augmented pictures, for training convolutions."""

    def __init__(self, prepared, options: argparse.Namespace, device) -> None:
        self.prepared, self.options, self.device = prepared, options, device
        self.normalise = data.Normalise(prepared.preprocess, device)
        self.steps_per_epoch = data.batch_count(len(prepared.train), options.batch_size)

    def train(self, epoch: int, start: int) -> Iterator:
        options = self.options
        order = torch.randperm(len(self.prepared.train), generator=seeded(options.seed, epoch))
        loader = data.batches(self.prepared.train, order, options.batch_size, self.device, start)
        for step, (images, labels) in enumerate(loader, start):
            generator = seeded(options.seed, epoch, step + 1)
            yield data.augment(self.normalise(images), options.image_size, options.augmentation, generator), labels

    def evaluation(self, split) -> Iterator:
        for images, labels in data.batches(split, torch.arange(len(split)), 64, self.device):
            yield self.normalise(images), labels


class Features:
    """Batches of a frozen backbone's features: each picture, in several augmented views, went through it once."""

    def __init__(self, prepared, options: argparse.Namespace, device, model, autocast) -> None:
        self.options, self.device = options, device
        pictures = Pictures(prepared, options, device)
        self.steps_per_epoch = data.batch_count(len(prepared.train), options.batch_size)
        self.labels = prepared.train.labels.to(device)
        views = []
        for view in range(options.views):
            # the first view is the plain centre, as the server sees pictures
            kind = "none" if view == 0 else options.augmentation
            loader = data.batches(prepared.train, torch.arange(len(prepared.train)), 64, device)
            views.append(torch.cat([
                extract(model, data.augment(pictures.normalise(images), options.image_size, kind,
                                            seeded(options.seed, view, step)), autocast)
                for step, (images, _) in enumerate(loader)
            ]))  # fmt: skip
        self.views = torch.stack(views)  # [views, N, 512]
        self.splits = {
            id(split): [(extract(model, images, autocast), labels) for images, labels in pictures.evaluation(split)]
            for split in (prepared.validation, prepared.test)
        }

    def train(self, epoch: int, start: int) -> Iterator:
        generator = seeded(self.options.seed, epoch)
        count = len(self.labels)
        order = torch.randperm(count, generator=generator)
        view = torch.randint(len(self.views), (count,), generator=generator)
        for step in range(start, self.steps_per_epoch):
            last = step + 1 == self.steps_per_epoch
            at = order[step * self.options.batch_size : None if last else (step + 1) * self.options.batch_size]
            yield self.views[view[at], at], self.labels[at]

    def evaluation(self, split) -> Iterator:
        yield from self.splits[id(split)]


def extract(model, images, autocast):
    with torch.inference_mode(), autocast():
        found = features(model, images).float()
    return found.clone()  # a tensor made in inference mode cannot be trained on
