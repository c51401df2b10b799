"""Compares the challenger with the champion on the test split, with the code that serves: what an evaluation job runs.

    export PYTHONPATH=../inference  # in a checkout, where preprocessing.py has its place
    python evaluate.py --dataset snapshot --images images --challenger new/model.tar.gz --output evaluation
    python evaluate.py … --champion live/model.tar.gz

Runs in the serving image: no torch, the same preprocessing and predictor as the endpoint. Models are compared by the
names of their classes, never by position, and the champion only on classes that it knows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import artifact
import preprocessing
from predictor import BadArtifact, Predictor
from preprocessing import BrokenImage


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


def judge(model_dir: Path, rows: list[dict], images: Path) -> dict[str, Any]:
    """One model's answers to the pictures: accuracy, per class, latency, predictions.

    A picture of a class that the model does not know counts as wrong, and so does one that cannot be read. Latency is a
    picture's preparation and prediction, alone, in milliseconds.
    """
    predictor = Predictor(model_dir)
    seen, right = Counter[str](), Counter[str]()
    predictions, latencies = [], []
    for row in rows:
        begun = time.perf_counter()
        predicted, probability = None, 0.0
        try:
            pixels = preprocessing.crop((images / row["sha256"]).read_bytes(), predictor.preprocess)
            size = predictor.preprocess.size
            answer = predictor.predict(np.frombuffer(pixels, np.uint8).reshape(1, size, size, 3))[0]
            predicted, probability = predictor.classes[int(answer.argmax())], float(answer.max())
            latencies.append(1000 * (time.perf_counter() - begun))
        except BrokenImage as error:
            print(f"{row['sha256'][:12]}: {error}", flush=True)
        seen[row["class"]] += 1
        right[row["class"]] += predicted == row["class"]
        predictions.append({"sha256": row["sha256"], "class": row["class"], "predicted": predicted,
                            "probability": round(probability, 6)})  # fmt: skip
    return {
        "accuracy": sum(right.values()) / len(rows),
        "preprocess": json.loads(predictor.preprocess.to_json()),
        "per_class": {name: {"n": seen[name], "correct": right[name]} for name in sorted(seen)},
        "latency_ms_p50": round(statistics.median(latencies), 3) if latencies else None,
        "classes": predictor.classes,
        "predictions": predictions,
    }


def compare(challenger: dict, champion: dict | None, classes: list[str]) -> dict[str, Any]:
    """evaluation.json. `classes`: of the dataset; the champion was judged on those of them that it knows."""
    known = set(champion.pop("classes")) if champion else set()
    trained = set(challenger.pop("classes"))
    common = sorted(trained & known & set(classes))
    counts = None
    if champion:
        here, there = challenger["per_class"], champion["per_class"]
        tested = [name for name in common if name in here]
        counts = {
            "n": sum(here[name]["n"] for name in tested),
            "challenger_correct": sum(here[name]["correct"] for name in tested),
            "champion_correct": sum(there[name]["correct"] for name in tested),
        }
    return {
        "challenger": challenger,
        "champion": champion,
        "common_classes": common,
        "new_classes": sorted(trained - known),
        "common": counts,
    }


def evaluate(dataset: Path, images: Path, challenger: Path, champion: Path | None, output: Path) -> dict[str, Any]:
    """Judges the models and writes evaluation.json to `output`. Raises EvaluationError."""
    rows = read_test_split(dataset)
    classes = json.loads((dataset / "classes.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        here = judge(artifact.extract(find_archive(challenger), Path(scratch, "challenger")), rows, images)
        there = None
        if champion is not None:
            folder = artifact.extract(find_archive(champion), Path(scratch, "champion"))
            known = set(json.loads((folder / artifact.CLASSES).read_text()))
            familiar = [row for row in rows if row["class"] in known]
            if familiar:
                there = judge(folder, familiar, images)
            else:
                print("champion: not judged, the test split has no picture of a class that it knows", flush=True)
    result = compare(here, there, classes)
    artifact.write_json(output / "evaluation.json", result)
    return result


def main(arguments: list[str] | None = None) -> int:
    container = Path(__file__).absolute().parents[2]  # the job's input `code` is /opt/ml/processing/input/code
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=container / "input/dataset")
    parser.add_argument("--images", type=Path, default=container / "input/images")
    parser.add_argument("--challenger", type=Path, default=container / "input/challenger")
    parser.add_argument("--champion", type=Path, help="left out, it is looked for in its input, which may not exist")
    parser.add_argument("--output", type=Path, default=container / "output/evaluation")
    options = parser.parse_args(arguments)
    champion = options.champion
    if champion is None and (container / "input/champion/model.tar.gz").is_file():
        champion = container / "input/champion"
    try:
        result = evaluate(options.dataset, options.images, options.challenger, champion, options.output)
    except (BadArtifact, ValueError, tarfile.TarError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        artifact.exit_message(container, str(error))
        return 1
    for name in ("challenger", "champion"):
        if result[name]:
            print(f"{name}: accuracy {result[name]['accuracy']:.4f} on {len(result[name]['predictions'])} pictures, "
                  f"{result[name]['latency_ms_p50']} ms a picture")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
