"""What a training run would learn from: which labels take part, and the identity of the result. Pure functions."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Picture:
    sha256: str
    class_name: str
    split: str
    origin: str


@dataclass(frozen=True)
class Dataset:
    """The pictures of the classes that take part, and why the rest does not."""

    pictures: list[Picture]
    left_out: dict[str, str] = field(default_factory=dict)
    """Why: by class name, or by sha256 for a picture that contradicts itself."""

    @property
    def classes(self) -> list[str]:
        """Sorted: the class index of every model made from this dataset."""
        return sorted({picture.class_name for picture in self.pictures})

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(picture.class_name for picture in self.pictures))

    @property
    def hash(self) -> str:
        """Identity of the content: pictures, classes and splits, not where they came from."""
        lines = sorted(f"{p.sha256} {p.class_name} {p.split}" for p in self.pictures)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def manifest(self) -> str:
        """One JSON line a picture, in a stable order."""
        lines = (
            json.dumps({"sha256": p.sha256, "class": p.class_name, "split": p.split, "origin": p.origin})
            for p in sorted(self.pictures, key=lambda p: (p.class_name, p.sha256))
        )
        return "\n".join(lines) + "\n"


def assemble(labels: Iterable[dict[str, Any]], min_pictures: int) -> Dataset:
    """The dataset that `labels` (items of the ledger) make, of the classes with at least `min_pictures` pictures.

    A picture labelled twice with one class counts once; with two classes it is left out, and named.
    """
    by_content: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for label in labels:
        by_content[label["sha256"]].append(label)
    left_out: dict[str, str] = {}
    by_class: dict[str, list[Picture]] = defaultdict(list)
    for sha256, same in by_content.items():
        names = sorted({label["class"] for label in same})
        if len(names) > 1:
            left_out[sha256] = f"the same picture is labelled {' and '.join(names)}"
            continue
        first = min(same, key=lambda label: label["key"])
        origin = f"s3://{first['bucket']}/{first['key']}"
        by_class[names[0]].append(Picture(sha256, names[0], first["split"], origin))
    pictures: list[Picture] = []
    for name, members in sorted(by_class.items()):
        missing = min_pictures - len(members)
        empty = [split for split in SPLITS if not any(p.split == split for p in members)]
        if missing > 0:
            left_out[name] = (
                f"{name} has {len(members)} of the {min_pictures} pictures a class needs: {missing} missing"
            )
        elif empty:
            left_out[name] = f"{name} has no picture for {' and '.join(empty)}: add some that do not look alike"
        else:
            pictures.extend(members)
    return Dataset(pictures, left_out)


def why_too_small(dataset: Dataset) -> str | None:
    """Why nothing can be trained from `dataset`, in words, or None."""
    if len(dataset.classes) >= 2:
        return None
    reasons = "; ".join(dataset.left_out.values()) or "no pictures are labelled"
    return f"training needs two classes or more, {len(dataset.classes)} can take part: {reasons}"
