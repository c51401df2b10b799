"""What a training run would learn from: which labels take part, and the identity of the result. Pure functions."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from common.names import fold
from common.splits import SPLITS, Splits, assign

Label = dict[str, Any]
MOST_REASONS = 20  # that are told in a message; left_out.json has all


@dataclass(frozen=True)
class Picture:
    sha256: str
    class_name: str
    split: str
    origin: str


@dataclass(frozen=True)
class LeftOut:
    """A picture that was labelled and takes no part."""

    sha256: str
    reason: str
    origins: list[str]


@dataclass(frozen=True)
class Dataset:
    """The pictures of the classes that take part, and why the rest does not."""

    pictures: list[Picture]
    left_out: dict[str, str] = field(default_factory=dict)
    """Why, by class name as it is spelled in the labels."""
    left_out_pictures: list[LeftOut] = field(default_factory=list)
    """Pictures that contradict themselves, or that would join two splits."""
    new_splits: Splits = field(default_factory=Splits)
    """What was dealt here for the first time, and is to be saved before anything learns from it."""

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

    @property
    def reasons(self) -> list[str]:
        """What is left out and why, in words, at most MOST_REASONS of them: classes first."""
        found = list(self.left_out.values())
        found += [f"{each.origins[0]} is left out: {each.reason}" for each in self.left_out_pictures]
        if len(found) > MOST_REASONS:
            found = [*found[: MOST_REASONS - 1], f"and {len(found) - MOST_REASONS + 1} more (left_out.json has all)"]
        return found

    def manifest(self) -> str:
        """One JSON line a picture, in a stable order."""
        lines = (
            json.dumps({"sha256": p.sha256, "class": p.class_name, "split": p.split, "origin": p.origin})
            for p in sorted(self.pictures, key=lambda p: (p.class_name, p.sha256))
        )
        return "\n".join(lines) + "\n"

    @classmethod
    def from_manifest(cls, text: str) -> "Dataset":
        """The dataset of a snapshot, years later; KeyError or ValueError where the text is no manifest."""
        lines = (json.loads(line) for line in text.splitlines())
        return cls([Picture(each["sha256"], each["class"], each["split"], each["origin"]) for each in lines])


def assemble(labels: Iterable[Label], known: Splits, min_pictures: int) -> Dataset:
    """The dataset that `labels` (items of the ledger) make, of the classes with at least `min_pictures` pictures.

    A picture labelled twice with one class counts once; with two classes it is left out. Of two spellings of a class
    the one that more pictures have is the class, and the labels in the other are left out. Every picture that agrees
    with itself gets a split here, if it has none in `known`, also while its class is too small to take part.
    """
    by_content: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_content[label["sha256"]].append(label)
    spelled = _spellings(by_content.values())
    misspelled: Counter[str] = Counter()
    left_out_pictures: list[LeftOut] = []
    chosen: dict[str, Label] = {}
    for sha256, same in by_content.items():
        names = sorted({spelled[fold(label["class"])] for label in same})
        well = [label for label in same if label["class"] == names[0]]
        if len(names) > 1:
            left_out_pictures.append(_leave(sha256, same, f"the same picture is labelled {' and '.join(names)}"))
        elif well:
            chosen[sha256] = min(well, key=_origin)
        else:
            misspelled.update({label["class"] for label in same})
    classes: dict[str, str] = {}
    for label in chosen.values():
        classes[label["phash"]] = min(label["class"], classes.get(label["phash"], label["class"]))
    new_splits, torn = assign(classes, known)
    splits = known.of | new_splits.of
    by_class: dict[str, list[Picture]] = {name: [] for name in spelled.values()}
    for sha256, label in chosen.items():
        if two := torn.get(label["phash"]):
            reason = f"it looks like pictures of {' and of '.join(two)}, and would join the two splits"
            left_out_pictures.append(_leave(sha256, by_content[sha256], reason))
        else:
            by_class[label["class"]].append(Picture(sha256, label["class"], splits[label["phash"]], _origin(label)))
    left_out = {
        name: f"{count} pictures are labelled {name!r}, which is another spelling of {spelled[fold(name)]!r}: "
        f"label them {spelled[fold(name)]!r}"
        for name, count in sorted(misspelled.items())
    }
    pictures: list[Picture] = []
    for name, members in sorted(by_class.items()):
        if why := _why_left_out(name, members, min_pictures):
            left_out[name] = why
        else:
            pictures.extend(members)
    left_out_pictures.sort(key=lambda each: each.sha256)
    return Dataset(pictures, left_out, left_out_pictures, new_splits)


def why_too_small(dataset: Dataset) -> str | None:
    """Why nothing can be trained from `dataset`, in words, or None."""
    if len(dataset.classes) >= 2:
        return None
    more = "label pictures of another class" if dataset.classes else "no pictures are labelled"
    reasons = "; ".join(dataset.reasons) or more
    return f"training needs two classes or more, {len(dataset.classes)} can take part: {reasons}"


def _spellings(contents: Iterable[list[Label]]) -> dict[str, str]:
    """The spelling of each folded class name: what most pictures have, then the first registered, then by alphabet."""
    pictures: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[str, str] = {}
    for same in contents:
        for name in {label["class"] for label in same}:
            pictures[fold(name)][name] += 1
        for label in same:
            first[label["class"]] = min(label["registered_at"], first.get(label["class"], label["registered_at"]))
    return {
        folded: min(counts, key=lambda name: (-counts[name], first[name], name)) for folded, counts in pictures.items()
    }


def _why_left_out(name: str, members: list[Picture], min_pictures: int) -> str | None:
    missing = min_pictures - len(members)
    if missing > 0:
        return f"{name} has {len(members)} of the {min_pictures} pictures a class needs: {missing} missing"
    empty = [split for split in SPLITS if not any(p.split == split for p in members)]
    if empty:
        return f"{name} has no picture for {' and '.join(empty)}: add some that do not look alike"
    return None


def _leave(sha256: str, same: list[Label], reason: str) -> LeftOut:
    return LeftOut(sha256, reason, sorted({_origin(label) for label in same}))


def _origin(label: Label) -> str:
    return f"s3://{label['bucket']}/{label['key']}"
