"""Measures the challenger in each precision it can be served in, chooses one, and compares it with the champion on the
test split, with the code that serves: what an evaluation job runs.

    export PYTHONPATH=../inference  # in a checkout, where preprocessing.py has its place
    python evaluate.py --dataset snapshot --images images --challenger new/model.tar.gz --output evaluation
    python evaluate.py … --champion live/model.tar.gz --champion-precision int8 --settled snapshot-of-the-champion

Runs in the serving image: no torch, the same preprocessing and predictor as the endpoint. Which precision is fastest
depends on the processor, so the job runs on the endpoint's. Models are compared by the names of their classes, never by
position, and the champion only on classes that it knows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import artifact
import preprocessing
from artifact import TOLERANCE
from predictor import PRECISIONS, BadArtifact, Predictor, core, obstacle
from preprocessing import BrokenImage

# A less exact precision must be this much faster than a more exact one: less is within what measurements vary by.
GAIN = 0.05

BLOCK = 16  # pictures that one precision predicts before the next takes over: neighbours on the machine slow all alike


class EvaluationError(ValueError):
    """Nothing can be evaluated. The text says why."""


def find_archive(path: Path) -> Path:
    """The model.tar.gz at `path`, a file or the folder of an input. Raises EvaluationError."""
    found = path if path.is_file() else path / "model.tar.gz"
    if not found.is_file():
        raise EvaluationError(f"no model.tar.gz at {path}")
    return found


def read_test_split(dataset: Path) -> list[dict]:
    """The rows of manifest.jsonl that are of the test split. Raises EvaluationError."""
    manifest = dataset / "manifest.jsonl"
    if not manifest.is_file():
        raise EvaluationError(f"{dataset} has no manifest.jsonl")
    rows = [json.loads(line) for line in manifest.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if row["split"] == "test"]
    if not rows:
        raise EvaluationError("the dataset has no pictures in its test split, so nothing can be compared")
    return rows


@dataclass(frozen=True)
class Answers:
    """What one predictor answered to N pictures; NaN for those that cannot be read."""

    predictor: Predictor
    probabilities: np.ndarray
    """float32 [N, classes]"""
    prediction_ms: np.ndarray
    """float64 [N]: of each picture alone, prepared"""
    total_ms: np.ndarray
    """float64 [N]: with its preparation"""

    def readable(self) -> np.ndarray:
        return ~np.isnan(self.prediction_ms)

    def labels(self) -> np.ndarray:
        """int64 [N], indices into the predictor's classes; -1 where there is no answer."""
        return np.where(self.readable(), np.nan_to_num(self.probabilities).argmax(1), -1)


def answer(predictors: list[Predictor], rows: list[dict], images: Path) -> list[Answers]:
    """The answers of each predictor to the same pictures, each of which is decoded once for all that cut it alike."""
    count = len(rows)
    answers = [
        Answers(p, np.full((count, len(p.classes)), np.nan, np.float32), np.full(count, np.nan), np.full(count, np.nan))
        for p in predictors
    ]
    for first in range(0, count, BLOCK):
        block = range(first, min(first + BLOCK, count))
        crops = {p.preprocess: crop([images / rows[at]["sha256"] for at in block], p.preprocess) for p in predictors}
        for found in answers:
            for at, (pixels, preparation) in zip(block, crops[found.predictor.preprocess], strict=True):
                if pixels is None:
                    continue
                begun = time.perf_counter()
                found.probabilities[at] = found.predictor.predict(pixels)[0]
                found.prediction_ms[at] = 1000 * (time.perf_counter() - begun)
                found.total_ms[at] = found.prediction_ms[at] + preparation
    return answers


def crop(paths: list[Path], spec: preprocessing.Preprocess) -> list[tuple[np.ndarray | None, float]]:
    """Of each picture uint8 [1, size, size, 3], or None where it cannot be read, and how long that took (ms)."""
    crops = []
    for path in paths:
        begun, pixels = time.perf_counter(), None
        try:
            pixels = np.frombuffer(preprocessing.crop(path.read_bytes(), spec), np.uint8)
            pixels = pixels.reshape(1, spec.size, spec.size, 3)
        except BrokenImage as error:
            print(f"{path.name[:12]}: {error}", flush=True)
        crops.append((pixels, 1000 * (time.perf_counter() - begun)))
    return crops


def median(values: np.ndarray) -> float | None:
    """Of those that are there; None where there are none."""
    values = values[~np.isnan(values)]
    return round(float(np.median(values)), 3) if len(values) else None


def judge(answers: Answers, rows: list[dict], taken: list[int]) -> dict[str, Any]:
    """How good one model is on the rows with the numbers `taken`: accuracy, per class, latency, predictions.

    A picture of a class that the model does not know counts as wrong, and so does one that cannot be read. Latency is a
    picture's preparation and prediction, alone, in milliseconds.
    """
    seen, right = Counter[str](), Counter[str]()
    predictions = []
    labels, classes = answers.labels(), answers.predictor.classes
    for at in taken:
        row, label = rows[at], labels[at]
        predicted, probability = None, 0.0
        if label >= 0:
            predicted, probability = classes[label], float(answers.probabilities[at, label])
        seen[row["class"]] += 1
        right[row["class"]] += predicted == row["class"]
        milliseconds = None if label < 0 else round(float(answers.total_ms[at]), 3)
        predictions.append({"sha256": row["sha256"], "origin": row.get("origin"), "class": row["class"],
                            "predicted": predicted, "probability": round(probability, 6),
                            "ms": milliseconds})  # fmt: skip
    return {
        "accuracy": sum(right.values()) / len(taken),
        "precision": answers.predictor.precision,
        "preprocess": json.loads(answers.predictor.preprocess.to_json()),
        "per_class": {name: {"n": seen[name], "correct": right[name]} for name in sorted(seen)},
        "latency_ms_p50": median(answers.total_ms[taken]),
        "classes": classes,
        "predictions": predictions,
    }


# The precision -------------------------------------------------------------------------------------------------------


def open_all(folder: Path) -> tuple[list[Predictor], dict[str, str]]:
    """The model in each precision that it has here, float32 first, and why it is not there in the others.

    Raises BadArtifact where it cannot be served in float32.
    """
    predictors, unavailable = [Predictor(folder)], {}
    for precision in PRECISIONS[1:]:
        if reason := obstacle(folder, precision):
            unavailable[precision] = reason
            continue
        try:
            predictors.append(Predictor(folder, precision))
        except BadArtifact as error:
            unavailable[precision] = str(error)
    return predictors, unavailable


def read_reference(folder: Path, rows: list[dict]) -> tuple[np.ndarray, np.ndarray] | None:
    """What torch answered: numbers of the rows [M] and float32 [M, classes]. None where the artifact does not say."""
    path = folder / artifact.REFERENCE
    if not path.is_file():
        return None
    with np.load(path) as stored:
        known = {sha256: at for at, sha256 in enumerate(stored["sha256"].tolist())}
        taken = [number for number, row in enumerate(rows) if row["sha256"] in known]
        if not taken:
            return None
        return np.array(taken), stored["probabilities"][[known[rows[number]["sha256"]] for number in taken]]


def measure(
    answers: list[Answers], rows: list[dict], reference: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, Any]:
    """Each precision's figures on the pictures that the reference answered, which is float32 itself without one.

    Raises EvaluationError where float32 differs from the reference by more than TOLERANCE.
    """
    exact = answers[0]
    taken, expected = reference or (np.arange(len(rows)), exact.probabilities)
    read = exact.readable()[taken]
    taken, expected = taken[read], expected[read]
    if not len(taken):
        raise EvaluationError("no picture of the test split can be read, so nothing can be measured")
    classes = exact.predictor.classes
    truth = np.array([classes.index(rows[at]["class"]) if rows[at]["class"] in classes else -1 for at in taken])
    labels = expected.argmax(1)
    measured: dict[str, dict[str, Any]] = {}
    for found in answers:
        difference = np.abs(found.probabilities[taken] - expected)
        own = found.labels()[taken]
        measured[found.predictor.precision] = {
            "correct": int((own == truth).sum()),
            "accuracy": float((own == truth).mean()),
            "agreement": float((own == labels).mean()),
            "max_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
            "latency_ms_p50": median(found.prediction_ms),
        }
    largest = float(np.abs(exact.probabilities[taken] - expected).max())
    if not largest <= TOLERANCE:
        raise EvaluationError(
            f"served in f32 the model differs from the one that was trained by {largest:.2g} in a probability, on the "
            f"same pictures; at most {TOLERANCE:.0e} can be rounding. Are training and serving image of one version?"
        )
    return {
        "reference": "torch" if reference else "f32",
        "pictures": len(taken),
        "correct": int((labels == truth).sum()),
        "accuracy": float((labels == truth).mean()),
        "measured": measured,
    }


def choose(measured: Mapping[str, Mapping[str, Any]], correct: int, pictures: int, max_drop: float) -> str:
    """The fastest precision that answers at most the share `max_drop` of the pictures less correctly than `correct`.

    `measured`: by precision, the most exact first: how many of the `pictures` are `correct`, and `latency_ms_p50`. Half
    a percent of forty pictures is none: not one may be lost, net. f32 always qualifies.
    """
    best = "f32"
    for precision, figures in measured.items():
        lost = correct - figures["correct"]
        faster = figures["latency_ms_p50"] < (1 - GAIN) * measured[best]["latency_ms_p50"]
        if lost <= max_drop * pictures + 1e-9 and faster:  # 0.005 * 200 is a little more or less than 1
            best = precision
    return best


def choose_precision(
    answers: list[Answers], rows: list[dict], folder: Path, unavailable: dict[str, str], wanted: str, max_drop: float
) -> dict[str, Any]:
    """What evaluation.json says about the precision. `wanted`: a precision, or `auto`. Raises EvaluationError."""
    found = measure(answers, rows, read_reference(folder, rows))
    if wanted in unavailable:
        raise EvaluationError(f"the model cannot be served in {wanted}, as it was asked to be: {unavailable[wanted]}")
    measured = found["measured"]
    chosen = wanted
    if wanted == "auto":
        chosen = choose(measured, found["correct"], found["pictures"], max_drop)
    return {
        "chosen": chosen,
        "reason": explain(chosen, found, unavailable, wanted, max_drop),
        "max_drop": max_drop,
        "processor": core().get_property("CPU", "FULL_DEVICE_NAME").strip(),
        **found,
        "unavailable": unavailable,
    }


def explain(chosen: str, found: Mapping[str, Any], unavailable: dict[str, str], wanted: str, max_drop: float) -> str:
    """The choice in words, with its figures."""
    measured, pictures = found["measured"], found["pictures"]
    own = measured[chosen]
    lost = found["correct"] - own["correct"]
    said = [f"served in {chosen}" + ("" if wanted == "auto" else ", as it was asked to be")]
    if chosen != "f32":
        times = measured["f32"]["latency_ms_p50"] / own["latency_ms_p50"]
        change = f"{abs(lost)} {'fewer' if lost > 0 else 'more'}" if lost else "as many"
        said.append(f"{times:.1f} times as fast as f32, {change} of {pictures} test pictures right")
    for precision, figures in measured.items():
        if wanted == "auto" and PRECISIONS.index(precision) > PRECISIONS.index(chosen):
            lost = found["correct"] - figures["correct"]
            allowed = int(max_drop * pictures + 1e-9)
            said.append(
                f"{precision} gets {lost} fewer right, {allowed} are allowed" if lost > allowed else
                f"{precision} is not faster"
            )  # fmt: skip
    said += [f"no {precision}: {reason}" for precision, reason in unavailable.items() if wanted == "auto"]
    return "; ".join(said)


# The comparison ------------------------------------------------------------------------------------------------------


PAIRED = {(True, True): "both", (True, False): "only_champion", (False, True): "only_challenger",
          (False, False): "neither"}  # fmt: skip

Settled = Set[tuple[str, str]]
"""sha256 and class of the pictures in the test split of the champion's own dataset. What is labelled wrong today is
wrong in today's test split, too, and speaks for a model that learnt it; these pictures are older than that."""


def pair(
    challenger: list[dict], champion: list[dict], classes: set[str], settled: Settled | None = None
) -> dict[str, Any]:
    """Both models' answers to the same pictures of `classes`, counted by which of them was right: what a paired test
    needs, in all, by class, and of the `settled` pictures alone.
    """
    theirs = {answer["sha256"]: answer["predicted"] == answer["class"] for answer in champion}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    old = Counter[str]()
    for answer in challenger:
        name, sha256 = answer["class"], answer["sha256"]
        if name in classes:
            kind = PAIRED[theirs[sha256], answer["predicted"] == name]
            counts[name][kind] += 1
            old[kind] += (sha256, name) in (settled or ())

    def table(counted: Counter[str]) -> dict[str, int]:
        return {"n": counted.total()} | {name: counted[name] for name in PAIRED.values()}

    whole = table(sum(counts.values(), Counter()))
    return whole | {
        "challenger_correct": whole["both"] + whole["only_challenger"],
        "champion_correct": whole["both"] + whole["only_champion"],
        "per_class": {name: table(counts[name]) for name in sorted(counts)},
        "settled": None if settled is None else table(old),
    }


def compare(
    challenger: dict, champion: dict | None, known: Set[str], classes: list[str], settled: Settled | None = None
) -> dict[str, Any]:
    """evaluation.json. `known`: the champion's classes; `classes`: of the dataset. The champion was judged on those
    that are both, and not at all (None) where there are none.
    """
    trained = set(challenger["classes"])
    common = sorted(trained & known & set(classes))
    for judged in (challenger, champion or {}):
        judged.pop("classes", None)
    return {
        "challenger": challenger,
        "champion": champion,
        "common_classes": common,
        "new_classes": sorted(trained - known),
        "missing_classes": sorted(known - trained),
        "common": pair(challenger["predictions"], champion["predictions"], set(common), settled) if champion else None,
    }


def evaluate(
    dataset: Path, images: Path, challenger: Path, champion: Path | None, output: Path, *,
    precision: str = "auto", max_drop: float = 0.005, champion_precision: str = "f32", settled: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Judges the models; writes evaluation.json and the challenger's card, with the precision that was chosen, to
    `output`. The challenger is judged in that precision, the champion in the one it is served in. `settled`: the
    champion's dataset.

    Raises EvaluationError.
    """
    rows = read_test_split(dataset)
    classes = json.loads((dataset / "classes.json").read_text())
    everything = list(range(len(rows)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = artifact.extract(find_archive(challenger), Path(scratch, "challenger"))
        predictors, unavailable = open_all(folder)
        served, familiar, known = [], [], set[str]()
        if champion is not None:
            live = Predictor(artifact.extract(find_archive(champion), Path(scratch, "champion")), champion_precision)
            known = set(live.classes)
            familiar = [number for number in everything if rows[number]["class"] in known]
            served = [live] if familiar else []
            if not familiar:
                print("champion: not judged, the test split has no picture of a class that it knows", flush=True)
        answers = answer([*predictors, *served], rows, images)
        own = answers[: len(predictors)]
        choice = choose_precision(own, rows, folder, unavailable, precision, max_drop)
        here = next(judge(found, rows, everything) for found in own if found.predictor.precision == choice["chosen"])
        there = judge(answers[-1], rows, familiar) if served else None
        card = predictors[0].card
    old = None if settled is None else {(row["sha256"], row["class"]) for row in read_test_split(settled)}
    result = compare(here, there, known, classes, old) | {"precision": choice}
    artifact.write_json(output / "evaluation.json", result)
    artifact.write_json(output / artifact.CARD, card | {"serving": choice})
    return result


def main(arguments: list[str] | None = None) -> int:
    container = Path(__file__).absolute().parents[2]  # the job's input `code` is /opt/ml/processing/input/code
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=container / "input/dataset")
    parser.add_argument("--images", type=Path, default=container / "input/images")
    parser.add_argument("--challenger", type=Path, default=container / "input/challenger")
    parser.add_argument("--champion", type=Path, help="left out, it is looked for in its input, which may not exist")
    parser.add_argument("--settled", type=Path, help="the champion's dataset; as the champion")
    parser.add_argument("--output", type=Path, default=container / "output/evaluation")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="to serve the challenger in")
    parser.add_argument("--max-drop", type=float, default=0.005, help="share of the test pictures that auto may lose")
    parser.add_argument("--champion-precision", choices=PRECISIONS, default="f32", help="the champion is served in it")
    options = parser.parse_args(arguments)
    champion = options.champion
    if champion is None and (container / "input/champion/model.tar.gz").is_file():
        champion = container / "input/champion"
    settled = options.settled
    if settled is None and (container / "input/settled/manifest.jsonl").is_file():
        settled = container / "input/settled"
    try:
        result = evaluate(
            options.dataset, options.images, options.challenger, champion, options.output,
            precision=options.precision, max_drop=options.max_drop, champion_precision=options.champion_precision,
            settled=settled,
        )  # fmt: skip
    except (BadArtifact, ValueError, tarfile.TarError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        artifact.exit_message(container, str(error))
        return 1
    except Exception as error:  # all that is told of a processing job is its exit message
        artifact.exit_message(container, f"{type(error).__name__}: {error}")
        raise
    for name, figures in result["precision"]["measured"].items():
        print(f"{name}: {figures['correct']} of {result['precision']['pictures']} right, same label as "
              f"{result['precision']['reference']} for {figures['agreement']:.1%}, probabilities differ by at most "
              f"{figures['max_difference']:.2g}, {figures['latency_ms_p50']} ms a prediction")  # fmt: skip
    print(result["precision"]["reason"])
    for name in ("challenger", "champion"):
        if result[name]:
            print(f"{name}: accuracy {result[name]['accuracy']:.4f} on {len(result[name]['predictions'])} pictures, "
                  f"{result[name]['latency_ms_p50']} ms a picture")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
