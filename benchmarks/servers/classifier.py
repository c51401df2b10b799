"""What every peer serves: ResNet-18 in torch, torchvision's reference transforms, the five likeliest classes as JSON.

The network is written out, with torchvision's names of the weights, and the transforms are torchvision's own steps on a
PIL picture. So no peer needs torchvision, whose CUDA build cannot be imported beside a CPU build of torch. The folder
that CLASSIFIER names holds weights.pt and classes.json; TORCH says whether the network runs `eager` or as a `frozen`
TorchScript.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
RESIZE, SIZE = 256, 224


class Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + shortcut)


def resnet18(classes: int) -> nn.Module:
    """[N, 3, 224, 224] to [N, classes] logits."""

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
            self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
            self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
            self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
            self.fc = nn.Linear(512, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    return ResNet()


def transform(image: Image.Image) -> torch.Tensor:
    """Resize, CenterCrop, ToTensor and Normalize: [1, 3, 224, 224] float32."""
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    width, height = int(RESIZE * width / short), int(RESIZE * height / short)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIZE, top + SIZE))))
    return ((pixels.permute(2, 0, 1).contiguous().float().div(255) - MEAN) / STD).unsqueeze(0)


class Classifier:
    """The model of a folder. One torch thread: whoever wants more cores starts more processes."""

    def __init__(self, folder: str | Path | None = None) -> None:
        torch.set_num_threads(1)
        folder = Path(folder or os.environ["CLASSIFIER"])
        self.classes: list[str] = json.loads((folder / "classes.json").read_text())
        model = resnet18(len(self.classes))
        model.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu", weights_only=True))
        self.model: Any = model.eval()
        if os.environ.get("TORCH") == "frozen":
            with torch.inference_mode():
                traced = torch.jit.freeze(torch.jit.trace(self.model, torch.zeros(1, 3, SIZE, SIZE)))
                self.model = torch.jit.optimize_for_inference(traced)
                for _ in range(3):
                    self.model(torch.zeros(1, 3, SIZE, SIZE))

    def classify(self, image: Image.Image) -> dict[str, Any]:
        """The answer that inference/ gives."""
        with torch.inference_mode():
            probabilities, indices = self.model(transform(image)).softmax(1)[0].topk(5)
        best = zip(indices.tolist(), probabilities.tolist(), strict=True)
        classes = [{"class": self.classes[index], "probability": round(share, 6)} for index, share in best]
        return {"predictions": [{"classes": classes}]}

    def answer(self, data: bytes) -> dict[str, Any]:
        """The same to a file's bytes."""
        return self.classify(Image.open(io.BytesIO(data)))
