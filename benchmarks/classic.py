"""A training script as it is mostly written first: the measure for benchmarks.training and benchmarks.accuracy.

    PYTHONPATH=.:training:inference python -m benchmarks.classic pictures --weights resnet18.pth --epochs 10

`pictures` holds train/<class>/… and validation/<class>/…, and perhaps test/<class>/…. Each epoch reads, decodes and
resizes every picture and sends it through the whole network, in float32, with a DataLoader that has its defaults
beside the batch size. The pretrained weights are frozen but for a new `fc`; with --unfreeze all they are trained too.
Pixels are not normalised, as in many such scripts; --normalise adds that. Prints a line for each epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

import model

model._import_resnet18()  # where torchvision's build is for CUDA and torch's is not, torchvision can be imported now

from torchvision import datasets, transforms  # noqa: E402
from torchvision.models import resnet18  # noqa: E402

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


def loaders(
    root: Path, size: int, normalise: bool, batch_size: int
) -> tuple[dict[str, torch.utils.data.DataLoader], int]:
    """A loader for each split that is there, and the number of classes."""
    last = [transforms.Normalize(MEAN, STD)] if normalise else []
    resize, tensor = transforms.Resize((size, size)), transforms.ToTensor()
    transform = {
        "train": transforms.Compose([resize, transforms.RandomHorizontalFlip(), tensor, *last]),
        "validation": transforms.Compose([resize, tensor, *last]),
        "test": transforms.Compose([resize, tensor, *last]),
    }
    folders = {
        split: datasets.ImageFolder(str(root / split), transform[split])
        for split in transform
        if (root / split).is_dir()
    }
    return {
        split: torch.utils.data.DataLoader(folder, batch_size=batch_size, shuffle=split == "train")
        for split, folder in folders.items()
    }, len(folders["train"].classes)


def evaluate(network: nn.Module, loader: torch.utils.data.DataLoader, device: torch.device) -> float:
    """The share of a split that is classified right."""
    network.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in loader:
            correct += (network(images.to(device)).argmax(1) == labels.to(device)).sum().item()
    return correct / len(loader.dataset)  # type: ignore[arg-type]


def train(options: argparse.Namespace) -> dict[str, float]:
    """The script. Returns the accuracy on the validation split, and on the test split where there is one."""
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, classes = loaders(options.data, options.size, options.normalise, options.batch_size)
    network = resnet18()
    network.load_state_dict(torch.load(options.weights, weights_only=True))
    for parameter in network.parameters():
        parameter.requires_grad = options.unfreeze == "all"
    network.fc = nn.Linear(network.fc.in_features, classes)
    network.to(device)
    criterion = nn.CrossEntropyLoss()
    trained = network.parameters() if options.unfreeze == "all" else network.fc.parameters()
    optimizer = torch.optim.Adam(trained, lr=options.lr)
    accuracy = {}
    for epoch in range(1, options.epochs + 1):
        begun = time.perf_counter()
        network.train()
        for images, labels in data["train"]:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
        trained_seconds = time.perf_counter() - begun
        accuracy["validation"] = evaluate(network, data["validation"], device)
        seconds = time.perf_counter() - begun
        print(
            json.dumps({"epoch": epoch, "seconds": seconds, "train_seconds": trained_seconds, **accuracy}), flush=True
        )
    if "test" in data:
        accuracy["test"] = evaluate(network, data["test"], device)
    return accuracy


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="state dict of torchvision's resnet18")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=255, help="pictures become squares of this side")
    parser.add_argument("--unfreeze", choices=("none", "all"), default="none")
    parser.add_argument("--normalise", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main() -> int:
    """The command."""
    print(json.dumps(train(arguments())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
