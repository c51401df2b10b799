"""evaluation.json as training/evaluate.py writes it, from how often which model is to be right."""

import itertools
from typing import Any

CLEAN: dict[str, Any] = {"blocking": False, "rules": [], "verdict": {"status": "Completed"}}
PREPROCESS = {"size": 32, "resize": 37, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
KINDS = ("both", "only_champion", "only_challenger", "neither")
Counts = tuple[int, int, int, int]


def evaluation(
    both: int = 0, only_champion: int = 0, only_challenger: int = 0, neither: int = 0, *,
    classes: dict[str, Counts] | None = None, new: dict[str, tuple[int, int]] | None = None, champion: bool = True,
    missing: tuple[str, ...] = (), milliseconds: tuple[float, float] = (10.0, 10.0), settled: Counts | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One class, `beagle`, with so many test pictures that both, one or none of the models got right.

    `classes`: the same for several; `new`: (right, all) of classes that the champion does not know; without `champion`
    every class is new; `missing`: classes that only the champion knows; `milliseconds`: a picture's, of challenger and
    champion; `settled`: how many of the known classes' pictures were in the champion's own test, where that is known.
    """
    known = classes or {"beagle": (both, only_champion, only_challenger, neither)}
    numbers = itertools.count()
    challenger, live = [], []

    def answer(name: str, right: bool, ms: float, number: int) -> dict[str, Any]:
        predicted = name if right else f"not {name}"
        return {"sha256": f"{number:064x}", "origin": f"s3://pictures/labelled/{number}.jpg", "class": name,
                "predicted": predicted, "probability": 0.9, "ms": ms}  # fmt: skip

    for name, counts in known.items():
        for kind, count in zip(KINDS, counts, strict=True):
            for number in itertools.islice(numbers, count):
                challenger.append(answer(name, kind in ("both", "only_challenger"), milliseconds[0], number))
                live.append(answer(name, kind in ("both", "only_champion"), milliseconds[1], number))
    for name, (right, total) in (new or {}).items():
        for place, number in enumerate(itertools.islice(numbers, total)):
            challenger.append(answer(name, place < right, milliseconds[0], number))
    per_class = {name: dict(zip(KINDS, counts, strict=True)) | {"n": sum(counts)} for name, counts in known.items()}
    total = {kind: sum(found[kind] for found in per_class.values()) for kind in (*KINDS, "n")}
    return {
        "challenger": model(challenger, milliseconds[0]),
        "champion": model(live, milliseconds[1]) if champion else None,
        "common_classes": sorted(known) if champion else [],
        "new_classes": sorted(new or {}) if champion else sorted({**known, **(new or {})}),
        "missing_classes": sorted(missing),
        "common": total
        | {
            "challenger_correct": total["both"] + total["only_challenger"],
            "champion_correct": total["both"] + total["only_champion"],
            "per_class": per_class,
            "settled": settled and {"n": sum(settled)} | dict(zip(KINDS, settled, strict=True)),
        }
        if champion
        else None,
        "precision": {"chosen": "int8", "reason": "served in int8; 2.9 times as fast as f32"},
    }


def model(predictions: list[dict[str, Any]], ms: float) -> dict[str, Any]:
    names = [answer["class"] for answer in predictions]
    right = [answer["class"] for answer in predictions if answer["predicted"] == answer["class"]]
    return {
        "accuracy": len(right) / len(predictions), "precision": "int8", "preprocess": PREPROCESS,
        "latency_ms_p50": ms, "predictions": predictions,
        "per_class": {name: {"n": names.count(name), "correct": right.count(name)} for name in dict.fromkeys(names)},
    }  # fmt: skip
