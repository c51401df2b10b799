"""Accuracy beside the script that is mostly written first, and what each measure for speed costs of it.

    pip install -r benchmarks/requirements.txt   # scikit-learn
    python -m benchmarks.accuracy
    python -m benchmarks.accuracy --quick

The pictures are scikit-learn's handwritten digits (1,797, UCI's test set), enlarged to 64 pixels, with fixed splits.
ImageNet's weights do not come with a library, so a ResNet-18 is trained on the digits 0 to 4 first, by train.py from
random weights; everybody then starts from that one file and learns 5 to 9, of which the backbone has seen none, from 20
pictures of each; 20 more are for validation and the rest, never looked at before the end, for the test. Everybody gets
the same epochs, batch size and picture size, trains once with each of three learning rates, and is judged by the test
of the one that was best in validation: a comparison of scripts, not of how well somebody guessed. Five seeds.

Houndloop is compared with the classic script as it is (benchmarks/classic.py, pixels not normalised) and with one that
normalises; with a frozen backbone and with all layers trained. Then what its speed costs: 16-bit convolutions against
32 bits, cached views against a fresh view in each epoch, and one cached view against several. The spread is the
standard deviation over the seeds; differences are taken seed by seed, with the standard error of their mean. Ends with
1 if Houndloop's mean is lower than that of a classic script. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import folders
from local.emulator import CHECKOUT

IMAGE_SIZE = 64
EPOCHS, BATCH_SIZE = 10, 16
TRAINED_ON, NEW = range(5), range(5, 10)
TRAIN, VALIDATION = 20, 20  # pictures of each new digit; the rest is for the test
BACKBONE_EPOCHS, BACKBONE_BATCH = 8, 64
RATES = {"none": (1e-3, 3e-3, 1e-2), "all": (3e-4, 1e-3, 3e-3)}
HOUNDLOOP, CLASSIC, NORMALISED = "Houndloop", "classic", "classic, normalised"


@dataclass(frozen=True)
class Contestant:
    """A script with its settings; `words` are options of train.py or of benchmarks.classic."""

    name: str
    unfreeze: str
    words: tuple[str, ...] = ()

    @property
    def classic(self) -> bool:
        return self.name in (CLASSIC, NORMALISED)


FRESH = f"a fresh view each epoch ({EPOCHS} views)"
CONTESTANTS = [
    *(
        Contestant(name, unfreeze, words)
        for unfreeze in ("none", "all")
        for name, words in ((CLASSIC, ()), (NORMALISED, ("--normalise",)), (HOUNDLOOP, ()))
    ),
    Contestant("32 bits", "none", ("--precision", "float32")),
    Contestant(FRESH, "none", ("--views", str(EPOCHS))),
    Contestant("one view", "none", ("--views", "1")),
    Contestant("32 bits", "all", ("--precision", "float32")),
]


@dataclass(frozen=True)
class Job:
    """One training of a contestant."""

    contestant: Contestant
    rate: float
    seed: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of the validation and of the test split that are classified right."""

    validation: float
    test: float


def write_digits(folder: Path) -> None:
    """Pictures of the digits: backbone/<split>/<digit>/… of TRAINED_ON and head/<split>/<digit>/… of NEW."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen: dict[int, int] = {}
    for pixels, digit in zip(digits.images, digits.target.tolist(), strict=True):
        number = seen[digit] = seen.get(digit, -1) + 1
        if digit in TRAINED_ON:
            target = folder / "backbone" / folders.split_of(number)
        else:
            split = "train" if number < TRAIN else "validation" if number < TRAIN + VALIDATION else "test"
            target = folder / "head" / split
        path = target / str(digit) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
        grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB").save(path)


def begin(threads: int) -> None:
    """In each worker: training's modules can be imported, and so many cores are used."""
    # A job takes SIGTERM for a notice and goes on, so a worker would outlive whoever started it.
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    sys.path[:0] = [str(CHECKOUT / "training"), str(CHECKOUT / "inference")]
    import torch

    torch.set_num_threads(threads)


def end_with(parent: int) -> None:
    """Ends this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextlib.contextmanager
def silent() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


def prepare(pictures: Path, target: Path) -> None:
    """The prepared dataset of a folder of pictures. Raises RuntimeError."""
    import prepare as job

    folders.snapshot(pictures, target)
    words = ["--image-size", str(IMAGE_SIZE), "--dataset", str(target / "dataset"), "--images", str(target / "images")]
    with silent() as said:
        code = job.main([*words, "--output", str(target / "prepared"), "--unfreeze", "all"])
    if code:
        raise RuntimeError(said.getvalue())


def train(prepared: Path, output: Path, *words: str) -> dict:
    """Runs train.py; returns the metrics of its model card. Raises RuntimeError."""
    import train as job

    words = ("--training", str(prepared), "--model-dir", str(output), "--output-dir", str(output), *words)
    words += ("--checkpoint-dir", str(output), "--checkpoint-seconds", "86400", "--image-size", str(IMAGE_SIZE))
    with silent() as said:
        code = job.main([*words, "--loader-workers", "1"])
    if code:
        raise RuntimeError(said.getvalue())
    return json.loads((output / "model_card.json").read_text())["metrics"]


def make_backbone(folder: Path) -> float:
    """Trains the backbone and writes it as the file of a weights channel; returns its accuracy in validation."""
    import torch

    prepare(folder / "backbone", folder / "first")
    words = ["--epochs", str(BACKBONE_EPOCHS), "--lr", "0.003", "--unfreeze", "all", "--weights", str(folder / "none")]
    words += ["--batch-size", str(BACKBONE_BATCH)]
    metrics = train(folder / "first" / "prepared", folder / "trained", *words)
    state = torch.load(folder / "trained" / "weights.pt", weights_only=True)
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}  # the shape of ImageNet's file
    (folder / "weights").mkdir()
    torch.save(state, folder / "weights" / "resnet18.pth")
    return metrics["validation_accuracy"]


def run(folder: Path, job: Job) -> Accuracy:
    """One training."""
    contestant = job.contestant
    words = ["--unfreeze", contestant.unfreeze, "--lr", str(job.rate), "--seed", str(job.seed), *contestant.words]
    words += ["--epochs", str(EPOCHS), "--batch-size", str(BATCH_SIZE)]
    if contestant.classic:
        from benchmarks import classic

        words += ["--weights", str(folder / "weights" / "resnet18.pth"), "--size", str(IMAGE_SIZE)]
        with silent():
            found = classic.train(classic.arguments([str(folder / "head"), *words]))
        return Accuracy(found["validation"], found["test"])
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words += ["--weights", str(folder / "weights"), "--patience", "1000", "--export", "false"]
        metrics = train(folder / "second" / "prepared", Path(output), *words)
    return Accuracy(metrics["validation_accuracy"], metrics["test_accuracy"])


def judged(found: dict[Job, Accuracy], contestant: Contestant, seeds: range) -> list[float]:
    """For each seed the test accuracy with the learning rate that was best in validation, the lowest of equals."""
    chosen = []
    for seed in seeds:
        runs = [(job, accuracy) for job, accuracy in found.items() if (job.contestant, job.seed) == (contestant, seed)]
        chosen.append(max(runs, key=lambda pair: (pair[1].validation, -pair[0].rate))[1].test)
    return chosen


def spread(values: list[float]) -> float:
    """The standard deviation; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two seeds, one learning rate")
    options = parser.parse_args()
    seeds = range(2 if options.quick else options.seeds)
    if len(seeds) < 1:
        parser.error("--seeds must be at least 1")
    if find_spec("sklearn") is None:
        parser.error("scikit-learn is not installed: pip install -r benchmarks/requirements.txt")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rates = {unfreeze: tried[1:2] if options.quick else tried for unfreeze, tried in RATES.items()}
    jobs = [Job(each, rate, seed) for seed in seeds for each in CONTESTANTS for rate in rates[each.unfreeze]]
    found: dict[Job, Accuracy] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="accuracy-") as name, Progress(*columns, console=console) as progress:
        task = progress.add_task("backbone", total=len(jobs))
        folder = Path(name)
        write_digits(folder)
        with ProcessPoolExecutor(1, spawn, begin, (cores,)) as pool:
            backbone = pool.submit(make_backbone, folder).result()
            pool.submit(prepare, folder / "head", folder / "second").result()
        with ProcessPoolExecutor(cores, spawn, begin, (1,)) as pool:
            progress.update(task, description="trainings")
            running = {pool.submit(run, folder, job): job for job in jobs}
            for done in as_completed(running):
                found[running[done]] = done.result()
                progress.advance(task)
    scores = {each: judged(found, each, seeds) for each in CONTESTANTS}
    own = {each.unfreeze: scores[each] for each in CONTESTANTS if each.name == HOUNDLOOP}
    title = f"test accuracy on digits 5 to 9, {EPOCHS} epochs, {len(seeds)} seeds, %"
    table = Table("trained", "script", "mean", "spread", "each seed", "Houndloop is higher by", title=title)
    broken, result = [], {}
    for unfreeze in ("none", "all"):
        for each in (each for each in CONTESTANTS if each.unfreeze == unfreeze):
            mean = statistics.mean(scores[each])
            higher = [mine - other for mine, other in zip(own[unfreeze], scores[each], strict=True)]
            error = spread(higher) / len(higher) ** 0.5
            table.add_row(
                "fc alone" if unfreeze == "none" else "all layers",
                each.name if each.classic or each.name == HOUNDLOOP else f"Houndloop, {each.name}",
                f"{100 * mean:.2f}",
                f"{100 * spread(scores[each]):.2f}",
                " ".join(f"{100 * score:.1f}" for score in scores[each]),
                "" if each.name == HOUNDLOOP else f"{100 * statistics.mean(higher):+.2f} ± {100 * error:.2f}",
            )
            result[f"{unfreeze}, {each.name}"] = [round(score, 4) for score in scores[each]]
            if each.classic and statistics.mean(higher) < 0:
                broken.append(f"{unfreeze}: lower than {each.name} by {-100 * statistics.mean(higher):.2f} points")
        table.add_section()
    console.print(table)
    console.print(f"backbone: {100 * backbone:.1f} % of the digits 0 to 4 in validation")
    for problem in broken:
        console.print(f"[red]{problem}")
    print(json.dumps({"benchmark": "accuracy", "seeds": len(seeds), "test": result, "ok": not broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
