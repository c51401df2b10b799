"""Decodes each picture of a dataset snapshot once, into arrays that training reads without decoding again.

    export PYTHONPATH=../inference  # in a checkout, where preprocessing.py has its place
    python prepare.py --image-size 224          # in a SageMaker processing job: every path has its container default
    python prepare.py --image-size 64 --dataset snapshot --images images --output prepared

Inputs: `dataset` and `images` (a snapshot), `previous` (an earlier output of this job: pictures that it holds are
copied, not decoded; optional), `weights` (pretrained ones; optional). With weights and a frozen backbone
(`--unfreeze none`) the backbone's features are extracted here, so that no trial of the tuning job does it again. A
picture that cannot be decoded is named and left out; more of them than --max-broken allows end the job with the list.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL
from PIL import features

import artifact
import preprocessing
from arguments import Parser, TrainingError, add_what_features_depend_on, number
from artifact import SPLITS
from preprocessing import BrokenImage, Preprocess

MIN_TRAIN_PICTURES = 2  # of each class; one picture cannot be told from its background


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


# Decoding ------------------------------------------------------------------------------------------------------------


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
        except MemoryError:
            broken.append((row, "decoding it takes more memory than there is"))
    array.flush()
    return broken


def decode(work: Callable, items: list[tuple[int, str]], workers: int) -> dict[int, str]:
    """Runs `work` on all items in parallel; why each broken row is broken.

    A picture that ends the process which decodes it (a decoder's fault, or the kernel taking back memory) takes the
    whole pool with it: what the pool had not finished is then decoded by other processes, one after the other.
    """
    reasons: dict[int, str] = {}
    chunks = [items[at : at + 32] for at in range(0, len(items), 32)]
    submitted: list[Future] = []
    with ProcessPoolExecutor(workers) as pool:
        with suppress(BrokenProcessPool):  # it may break while chunks are still being submitted
            for chunk in chunks:
                submitted.append(pool.submit(work, chunk))
        unfinished = chunks[len(submitted) :]
        for chunk, future in zip(chunks, submitted, strict=False):
            try:
                reasons.update(future.result())
            except BrokenProcessPool:
                unfinished.append(chunk)
    for chunk in unfinished:
        reasons |= decode_apart(work, chunk)
    return reasons


def decode_apart(work: Callable, items: list[tuple[int, str]]) -> dict[int, str]:
    """Runs `work` on the items in a process of their own, and where that ends, in one for each."""
    with ProcessPoolExecutor(1) as pool:
        try:
            return dict(pool.submit(work, items).result())
        except BrokenProcessPool:
            if len(items) == 1:
                return {items[0][0]: "decoding it ended the process that did it"}
    return {row: reason for item in items for row, reason in decode_apart(work, [item]).items()}


def prepare_split(
    rows: list[dict], spec: Preprocess, images: Path, path: Path, workers: int, known: dict[str, np.ndarray]
) -> tuple[list[dict], list[dict]]:
    """Writes one split's array to `path` (uint8 [N, size, size, 3]); returns the rows kept and those left out.

    `known`: crops of an earlier preparation by sha256, which are copied.
    """
    shape = (len(rows), spec.size, spec.size, 3)
    if not rows:
        np.save(path, np.zeros(shape, np.uint8))
        return [], []
    # `broken` rows leave holes: they are closed afterwards, so that decoding needs no lock and no second copy.
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for at, row in enumerate(rows):
        if row["sha256"] in known:
            array[at] = known[row["sha256"]]
    array.flush()
    items = [(at, row["sha256"]) for at, row in enumerate(rows) if row["sha256"] not in known]
    reasons = decode(partial(decode_into, path, shape, spec, images), items, workers)
    kept = [at for at in range(len(rows)) if at not in reasons]
    if reasons:
        for target, source in enumerate(kept):
            array[target] = array[source]
        np.save(path.with_suffix(".part.npy"), array[: len(kept)])
        os.replace(path.with_suffix(".part.npy"), path)
    print(f"{path.stem}: {len(kept)} pictures, {len(rows) - len(items)} of them as they were", flush=True)
    skipped = [{"origin": "", **rows[n], "reason": reasons[n]} for n in sorted(reasons)]
    return [rows[n] for n in kept], skipped


def code_version() -> str:
    """Of what decides a crop's bytes beside the settings: the shared preprocessing and the libraries that decode."""
    digest = hashlib.sha256(Path(preprocessing.__file__).read_bytes()).hexdigest()[:16]
    libraries = [f"{name} {features.version(name)}" for name in ("jpg", "libtiff", "webp", "avif")]
    return ", ".join([f"preprocessing {digest}", f"pillow {PIL.__version__}", *libraries])


def read_known(previous: Path | None, spec: Preprocess) -> dict[str, dict[str, np.ndarray]]:
    """By split the crops of an earlier preparation, where they would come out the same, byte for byte; else none."""
    if previous is None or not (previous / "index.json").is_file():
        return {}
    try:
        index = json.loads((previous / "index.json").read_text())
        if Preprocess.from_json((previous / "preprocess.json").read_text()) != spec or index["code"] != code_version():
            print("previous: not used, it was prepared with other settings or code", flush=True)
            return {}
        known = {}
        for split in SPLITS:
            array = np.load(previous / f"{split}.npy", mmap_mode="r")
            side = spec.resize if split == "train" else spec.size
            names = index["splits"][split]["sha256"]
            if array.shape != (len(names), side, side, 3) or array.dtype != np.uint8:
                raise ValueError(f"{split}.npy is {array.dtype} {array.shape}")
            known[split] = dict(zip(names, array, strict=True))
        return known
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"previous: not used, it cannot be read ({error})", flush=True)
        return {}


def prepare(
    dataset: Path, images: Path, output: Path, image_size: int, max_broken: float = 0.05, workers: int | None = None,
    previous: Path | None = None,
) -> dict:  # fmt: skip
    """Writes the prepared dataset (see data.py) to `output`; returns its index. Raises PrepareError.

    `previous`: an earlier output, from which pictures that are still there are copied; the result is the same without.
    """
    rows, classes = read_manifest(dataset)
    check_classes(rows, classes)
    output.mkdir(parents=True, exist_ok=True)
    spec = Preprocess.default(image_size)
    square = replace(spec, size=spec.resize)  # what random crops are taken from
    known = read_known(previous, spec)
    index: dict = {"code": code_version(), "splits": {}, "skipped": []}
    for split in SPLITS:
        wanted = [row for row in rows if row["split"] == split]
        cut, path = square if split == "train" else spec, output / f"{split}.npy"
        kept, skipped = prepare_split(wanted, cut, images, path, workers or cores(), known.get(split, {}))
        index["splits"][split] = {
            "labels": [classes.index(row["class"]) for row in kept],
            "sha256": [row["sha256"] for row in kept],
        }
        index["skipped"] += skipped
    for row in index["skipped"]:
        print(f"left out {row['sha256'][:12]} ({row['origin']}): {row['reason']}", flush=True)
    allowed = int(max_broken * len(rows))
    if len(index["skipped"]) > allowed:
        listed = "; ".join(f"{row['origin'] or row['sha256']}: {row['reason']}" for row in index["skipped"][:20])
        raise PrepareError(f"{len(index['skipped'])} of {len(rows)} pictures cannot be read, more than the {allowed} "
                           f"that are tolerated ({max_broken:.0%}). Replace or delete them: {listed}")  # fmt: skip
    lost = {row["sha256"] for row in index["skipped"]}
    check_classes([row for row in rows if row["sha256"] not in lost], classes)
    (output / "classes.json").write_text(json.dumps(classes))
    (output / "preprocess.json").write_text(spec.to_json())
    (output / "index.json").write_text(json.dumps(index))
    return index


def extract_features(options: argparse.Namespace) -> None:
    """What a frozen backbone makes of the prepared pictures, for every trial. Raises PrepareError."""
    if not any(options.weights.glob("*.pth")):
        return
    import data  # these need torch, which decoding does not
    import features as backbone_features
    from model import WeightsError

    begun = time.perf_counter()
    try:
        done = backbone_features.write(options.output, options, data.load(options.output), options.previous)
    except WeightsError as error:
        raise PrepareError(str(error)) from error
    print(f"features: {done}, in {time.perf_counter() - begun:.1f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    container = Path(__file__).absolute().parents[2]  # the job's input `code` is /opt/ml/processing/input/code
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", type=Path, default=container / "input/dataset")
    add("--images", type=Path, default=container / "input/images")
    add("--previous", type=Path, default=container / "input/previous", help="an earlier output of this job; optional")
    add("--output", type=Path, default=container / "output/prepared")
    add("--max-broken", type=number(float, 0, 1), default=0.05, help="share of unreadable pictures that is tolerated")
    add("--workers", type=int, help="processes; as many as cores when not given")
    add("--weights", type=Path, default=container / "input/weights", help="folder of the pretrained weights; optional")
    add_what_features_depend_on(add)
    begun = time.perf_counter()
    try:
        options = parser.parse_args(arguments)
        index = prepare(
            options.dataset, options.images, options.output, options.image_size, options.max_broken, options.workers,
            options.previous,
        )  # fmt: skip
        total = sum(len(split["labels"]) for split in index["splits"].values())
        print(f"prepared {total} pictures of {options.image_size} pixels in {time.perf_counter() - begun:.1f} s")
        if options.unfreeze == "none":
            extract_features(options)
    except (PrepareError, TrainingError) as error:
        return refuse(container, str(error))
    except Exception as error:  # all that is told of a processing job is its exit message
        artifact.exit_message(container, f"{type(error).__name__}: {error}")
        raise
    return 0


def refuse(container: Path, reason: str) -> int:
    print(f"prepare: {reason}", file=sys.stderr)
    artifact.exit_message(container, reason)
    return 1


if __name__ == "__main__":
    sys.exit(main())
