"""Decodes each picture of a dataset snapshot once, into arrays that training reads without decoding again.

    export PYTHONPATH=../inference  # in a checkout, where preprocessing.py has its place
    python prepare.py --image-size 224          # in a SageMaker processing job: every path has its container default
    python prepare.py --image-size 64 --dataset snapshot --images images --output prepared

A picture that cannot be decoded is named and left out; more of them than --max-broken allows end the job with the list.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import artifact
import preprocessing
from preprocessing import BrokenImage, Preprocess

MIN_TRAIN_PICTURES = 2  # of each class; one picture cannot be told from its background
SPLITS = ("train", "validation", "test")


class PrepareError(ValueError):
    """The dataset cannot be trained on. The text says why and what to do."""


def cores() -> int:
    """Cores that this process may use; macOS cannot say, so all of them there."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_manifest(dataset: Path) -> tuple[list[dict], list[str]]:
    """The rows of manifest.jsonl and the classes. Raises PrepareError."""
    for name in ("manifest.jsonl", "classes.json"):
        if not (dataset / name).is_file():
            raise PrepareError(f"{dataset} has no {name}: is this the folder of a dataset snapshot?")
    rows = [json.loads(line) for line in (dataset / "manifest.jsonl").read_text().splitlines() if line.strip()]
    classes = json.loads((dataset / "classes.json").read_text())
    unknown = sorted({row["class"] for row in rows} - set(classes))
    if unknown:
        raise PrepareError(f"manifest.jsonl has classes that classes.json has not: {', '.join(unknown[:5])}")
    odd = sorted({row["split"] for row in rows} - set(SPLITS))
    if odd:
        raise PrepareError(f"manifest.jsonl has the split {odd[0]!r}; only {', '.join(SPLITS)} are known")
    return rows, classes


def check_classes(rows: list[dict], classes: list[str]) -> None:
    """PrepareError when there is nothing to tell apart, or a class with too few pictures to learn from."""
    if len(classes) < 2:
        raise PrepareError(f"a classifier needs at least 2 classes; the dataset has {len(classes)}: {classes}")
    counts = Counter(row["class"] for row in rows if row["split"] == "train")
    few = [f"{name} ({counts[name]})" for name in classes if counts[name] < MIN_TRAIN_PICTURES]
    if few:
        raise PrepareError(
            f"too few readable training pictures: {', '.join(few)}; every class needs {MIN_TRAIN_PICTURES} or more"
        )
    if not any(row["split"] == "validation" for row in rows):
        raise PrepareError("no readable picture is in the validation split: the best epoch could not be told")


def decode_into(path: Path, shape: tuple[int, ...], spec: Preprocess, images: Path, items: list[tuple[int, str]]):
    """Worker: writes the crop of each (row, sha256) into the array file. Returns (row, reason) of the broken ones."""
    array = np.lib.format.open_memmap(path, mode="r+", shape=shape)
    broken = []
    for row, sha256 in items:
        try:
            pixels = preprocessing.crop((images / sha256).read_bytes(), spec)
            array[row] = np.frombuffer(pixels, np.uint8).reshape(shape[1:])
        except BrokenImage as error:
            broken.append((row, str(error)))
        except FileNotFoundError:
            broken.append((row, "the file is not in the images channel"))
    array.flush()
    return broken


def prepare_split(
    rows: list[dict], spec: Preprocess, images: Path, path: Path, pool: ProcessPoolExecutor
) -> tuple[list[dict], list[dict]]:
    """Writes one split's array to `path` (uint8 [N, size, size, 3]); returns the rows kept and those left out."""
    shape = (len(rows), spec.size, spec.size, 3)
    # `broken` rows leave holes: they are closed afterwards, so that decoding needs no lock and no second copy.
    if not rows:
        np.save(path, np.zeros(shape, np.uint8))
        return [], []
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    items = [(number, row["sha256"]) for number, row in enumerate(rows)]
    work = partial(decode_into, path, shape, spec, images)
    reasons = dict(sum(pool.map(work, [items[i : i + 32] for i in range(0, len(items), 32)]), []))
    kept = [number for number in range(len(rows)) if number not in reasons]
    if reasons:
        array = np.load(path, mmap_mode="r+")
        for target, source in enumerate(kept):
            array[target] = array[source]
        np.save(path.with_suffix(".part.npy"), array[: len(kept)])
        os.replace(path.with_suffix(".part.npy"), path)
    skipped = [{"origin": "", **rows[n], "reason": reasons[n]} for n in sorted(reasons)]
    return [rows[n] for n in kept], skipped


def prepare(
    dataset: Path, images: Path, output: Path, image_size: int, max_broken: float = 0.05, workers: int | None = None
) -> dict:
    """Writes the prepared dataset (see data.py) to `output`; returns a summary. Raises PrepareError."""
    started = time.perf_counter()
    rows, classes = read_manifest(dataset)
    check_classes(rows, classes)
    output.mkdir(parents=True, exist_ok=True)
    spec = Preprocess(size=image_size, resize=round(image_size * 256 / 224))
    square = replace(spec, size=spec.resize)  # what random crops are taken from
    index: dict = {"splits": {}, "skipped": []}
    with ProcessPoolExecutor(workers or cores()) as pool:
        for split in SPLITS:
            wanted = [row for row in rows if row["split"] == split]
            kept, skipped = prepare_split(
                wanted, square if split == "train" else spec, images, output / f"{split}.npy", pool
            )
            index["splits"][split] = {
                "labels": [classes.index(row["class"]) for row in kept],
                "sha256": [row["sha256"] for row in kept],
            }
            index["skipped"] += skipped
            print(f"{split}: {len(kept)} pictures", flush=True)
    for row in index["skipped"]:
        print(f"left out {row['sha256'][:12]} ({row['origin']}): {row['reason']}", flush=True)
    allowed = int(max_broken * len(rows))
    if len(index["skipped"]) > allowed:
        listed = "; ".join(f"{row['origin'] or row['sha256']}: {row['reason']}" for row in index["skipped"][:20])
        raise PrepareError(f"{len(index['skipped'])} of {len(rows)} pictures cannot be read, more than the {allowed} "
                           f"that are tolerated ({max_broken:.0%}). Replace or delete them: {listed}")  # fmt: skip
    lost = {row["sha256"] for row in index["skipped"]}
    check_classes([row for row in rows if row["sha256"] not in lost], classes)
    index["seconds"] = round(time.perf_counter() - started, 3)
    (output / "classes.json").write_text(json.dumps(classes))
    (output / "preprocess.json").write_text(spec.to_json())
    (output / "index.json").write_text(json.dumps(index))
    return index


def main(arguments: list[str] | None = None) -> int:
    container = Path(__file__).absolute().parents[2]  # the job's input `code` is /opt/ml/processing/input/code
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224, help="side of the model's input in pixels, 32 to 1024")
    parser.add_argument("--dataset", type=Path, default=container / "input/dataset")
    parser.add_argument("--images", type=Path, default=container / "input/images")
    parser.add_argument("--output", type=Path, default=container / "output/prepared")
    parser.add_argument("--max-broken", type=float, default=0.05, help="share of unreadable pictures that is tolerated")
    parser.add_argument("--workers", type=int, help="processes; as many as cores when not given")
    options = parser.parse_args(arguments)
    if not 32 <= options.image_size <= 1024:
        parser.error(f"--image-size must be from 32 to 1024, not {options.image_size}")
    try:
        index = prepare(
            options.dataset, options.images, options.output, options.image_size, options.max_broken, options.workers
        )
    except PrepareError as error:
        print(f"prepare: {error}", file=sys.stderr)
        artifact.exit_message(container, str(error))
        return 1
    total = sum(len(split["labels"]) for split in index["splits"].values())
    print(f"prepared {total} pictures of {options.image_size} pixels in {index['seconds']:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
