"""Fine-tuning with timm, as its training script puts timm's parts together: a peer for benchmarks.training.

    PYTHONPATH=.:training:inference python -m benchmarks.timm_script pictures --weights resnet18.pth --epochs 10

`pictures` as for benchmarks.classic. The loader, transforms, optimizer and schedule are timm's with the defaults of its
training script, at 224 pixels; of its options those that make it fast here: channels_last, autocast to bfloat16, and a
loader process for each core. With --unfreeze none all but the classifier is frozen, by timm's own `freeze`; the whole
network is run in each epoch then too. Prints a line for each epoch.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch

import model

model._import_resnet18()  # as in benchmarks.classic

import timm  # noqa: E402
from timm.data import create_dataset, create_loader, resolve_model_data_config  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import freeze  # noqa: E402

from benchmarks.classic import arguments, evaluate  # noqa: E402


def main() -> int:
    """The command."""
    options = arguments()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = {split: create_dataset("", root=str(options.data), split=split) for split in ("train", "validation")}
    classes = len(sets["train"].reader.class_to_idx)
    network = timm.create_model("resnet18")
    network.load_state_dict(torch.load(options.weights, weights_only=True))
    network.reset_classifier(classes)
    if options.unfreeze == "none":
        freeze(network, [name for name, _ in network.named_children() if name != "fc"])
    network = network.to(device, memory_format=torch.channels_last)
    config = resolve_model_data_config(network)
    loaders = {
        split: create_loader(
            data, config["input_size"], options.batch_size, is_training=split == "train", hflip=0.5, color_jitter=0.4,
            interpolation="random" if split == "train" else config["interpolation"], mean=config["mean"],
            std=config["std"], crop_pct=config["crop_pct"], num_workers=cores(), persistent_workers=True,
            use_prefetcher=device.type == "cuda", device=device,
        )
        for split, data in sets.items()
    }  # fmt: skip
    optimizer = create_optimizer_v2(network, opt="sgd", lr=0.01, weight_decay=2e-5, momentum=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=options.epochs)
    criterion = torch.nn.CrossEntropyLoss()
    for epoch in range(options.epochs):
        begun = time.perf_counter()
        network.train()
        for images, labels in loaders["train"]:
            images = images.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                loss = criterion(network(images), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step(epoch + 1)
        trained_seconds = time.perf_counter() - begun
        with torch.autocast(device.type, torch.bfloat16):
            accuracy = evaluate(network, loaders["validation"], device)
        seconds = time.perf_counter() - begun
        row = {"epoch": epoch + 1, "seconds": seconds, "train_seconds": trained_seconds, "validation": accuracy}
        print(json.dumps(row), flush=True)
    return 0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
