"""Folders of pictures for the training benchmarks: as torchvision's ImageFolder reads them, and as prepare.py does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from local.demo.pictures import PATTERNS, draw, jpeg

SIZE = (500, 375)  # pixels of a drawn picture: those of a photograph from the web, of its weight in bytes too
VALIDATION = 5  # every fifth picture of a class is in the validation split
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def draw_photograph(folder: Path, pattern: str, number: int) -> None:
    """Writes one drawn dog as a JPEG of SIZE: drawn small, because that is quicker, then enlarged and given grain."""
    random = np.random.default_rng([list(PATTERNS).index(pattern), number])
    width, height = SIZE
    drawn = draw(pattern, random, 192).resize((width, width), Image.Resampling.BICUBIC)
    top = (width - height) // 2
    pixels = np.asarray(drawn.crop((0, top, width, top + height)), np.float32)
    pixels = pixels + random.standard_normal((height, width, 1), np.float32) * 4
    target = folder / split_of(number) / pattern / f"{number:04d}.jpg"
    target.write_bytes(jpeg(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), 92))


def split_of(number: int) -> str:
    """The split of the picture with this number in its class."""
    return "validation" if number % VALIDATION == VALIDATION - 1 else "train"


def drawn(folder: Path, count: int) -> None:
    """Fills `folder` with about `count` drawn pictures: train/<class>/… and validation/<class>/…."""
    for split in ("train", "validation"):
        for pattern in PATTERNS:
            (folder / split / pattern).mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        for pattern in PATTERNS:
            list(pool.map(partial(draw_photograph, folder, pattern), range(count // len(PATTERNS)), chunksize=16))


def copied(data: Path, folder: Path) -> None:
    """Fills `folder` in the same way from a folder that holds one folder of pictures for each class.

    Raises ValueError where there are fewer than two classes, or a class of fewer than VALIDATION pictures.
    """
    found = {
        each.name: sorted(path for path in each.iterdir() if path.suffix.lower() in SUFFIXES)
        for each in sorted(data.iterdir())
        if each.is_dir()
    }
    few = [name for name, files in found.items() if len(files) < VALIDATION]
    if len(found) < 2 or few:
        raise ValueError(
            f"{data} must hold a folder for each of two or more classes, with {VALIDATION} pictures or more in each"
            + (f"; too few in {', '.join(few)}" if few else "")
        )
    for name, files in found.items():
        for number, file in enumerate(files):
            target = folder / split_of(number) / name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def snapshot(folder: Path, target: Path) -> None:
    """Writes the dataset snapshot of such a folder: target/dataset and target/images, which prepare.py reads."""
    (target / "dataset").mkdir(parents=True)
    (target / "images").mkdir()
    rows: dict[str, dict] = {}
    for path in sorted(path for path in folder.glob("*/*/*") if path.is_file()):
        split, name = path.parts[-3:-1]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        rows[sha256] = {"sha256": sha256, "class": name, "split": split, "origin": str(path.relative_to(folder))}
        if not (target / "images" / sha256).exists():
            os.link(path, target / "images" / sha256)
    classes = sorted({row["class"] for row in rows.values()})
    (target / "dataset" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    (target / "dataset" / "classes.json").write_text(json.dumps(classes))
