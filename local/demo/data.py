"""Which pictures the demo labels, which it keeps back to measure with, and which arrive while it deploys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from local.demo.pictures import pictures
from local.demo.settings import DemoError, Settings

FIRST_DRAWN = ["brindle", "saddle", "solid", "spotted"]
NEW_DRAWN = "merle"
HELD_OUT_DRAWN = 8  # per class
STREAM_DRAWN = 12  # per class, sent again and again while an endpoint is updated

SUFFIXES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
FEWEST = 8  # pictures of a class: fewer leave nothing to train on beside validation, test, and held-out ones


@dataclass(frozen=True)
class Picture:
    """One file: its name, its bytes, and the class that it truly is (None for a file that is no picture)."""

    name: str
    data: bytes
    truth: str | None

    @property
    def content_type(self) -> str:
        return SUFFIXES.get(Path(self.name).suffix.lower(), "application/octet-stream")


@dataclass(frozen=True)
class Collection:
    """Everything that the demo uploads. `held_out` is never labelled."""

    source: str
    first: list[str]  # classes of the first training run
    new: str  # the class that is labelled afterwards
    labelled: dict[str, list[Picture]]
    held_out: list[Picture]
    stream: list[Picture]

    @property
    def fewest(self) -> int:
        """The number of labelled pictures of the smallest class."""
        return min(len(found) for found in self.labelled.values())

    def endless_stream(self) -> Iterator[Picture]:
        """Pictures of the classes in turn, for ever."""
        return itertools.cycle(self.stream)


def collect(settings: Settings) -> Collection:
    """The pictures of DATA, or drawn ones. Raises DemoError if there is too little to run the loop on."""
    return _from_folder(settings.data) if settings.data else _drawn(settings.seed, settings.labelled)


def broken_files(picture: Picture) -> list[Picture]:
    """Three files that nobody can classify, as they turn up in any inbox. `picture` is cut short for one of them."""
    return [
        Picture("shopping-list.txt", b"Kibble\nA new tennis ball\nTreats (for the good ones)\n", None),
        Picture("half-uploaded.jpg", picture.data[: len(picture.data) // 3], None),
        Picture("empty.jpg", b"", None),
    ]


def _drawn(seed: int, labelled: int) -> Collection:
    classes = [*FIRST_DRAWN, NEW_DRAWN]
    if labelled < FEWEST:
        raise DemoError(f"--labelled must be at least {FEWEST}, not {labelled}.")

    def draw(pattern: str, count: int, part: int) -> list[Picture]:
        drawn = pictures(pattern, count, seed * 10 + part)
        return [Picture(f"{pattern}-{number:03d}.jpg", data, pattern) for number, data in enumerate(drawn, 1)]

    stream = [draw(c, STREAM_DRAWN, 3) for c in classes]
    return Collection(
        source="dogs drawn by the demo: the class is the pattern of the coat",
        first=list(FIRST_DRAWN),
        new=NEW_DRAWN,
        labelled={c: draw(c, labelled, 1) for c in classes},
        held_out=[picture for c in classes for picture in draw(c, HELD_OUT_DRAWN, 2)],
        stream=[picture for turn in zip(*stream, strict=True) for picture in turn],
    )


def _from_folder(folder: Path) -> Collection:
    if not folder.is_dir():
        raise DemoError(f"DATA={folder}: there is no such folder.")
    found = {
        child.name: sorted(f for f in child.iterdir() if f.is_file() and f.suffix.lower() in SUFFIXES)
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith((".", "_"))
    }
    found = {name: files for name, files in found.items() if files}
    if len(found) < 3:
        raise DemoError(
            f"DATA={folder} has pictures of {len(found)} class{'' if len(found) == 1 else 'es'}"
            f"{' (' + ', '.join(found) + ')' if found else ''}; the demo needs three or more, each in its subfolder: "
            "two to learn first and one to add later."
        )
    readable = {name: [file for file in files if _opens(file)] for name, files in found.items()}
    small = {name: len(files) for name, files in readable.items() if len(files) < FEWEST}
    if small:
        raise DemoError(
            f"DATA={folder} has too few readable pictures (JPEG, PNG or WebP) of "
            f"{', '.join(f'{name} ({count})' for name, count in small.items())}; every class needs at least {FEWEST}."
        )

    labelled: dict[str, list[Picture]] = {}
    held_out: list[Picture] = []
    for name, files in readable.items():
        read = [Picture(file.name, file.read_bytes(), name) for file in files]
        # Every n-th, not the first ones: folders are often sorted by where a picture came from.
        every = max(5, len(read) // 8)
        held_out += read[::every]
        labelled[name] = [picture for number, picture in enumerate(read) if number % every]
    *first, new = readable
    return Collection(f"{folder}, {len(readable)} classes", first, new, labelled, held_out, stream=list(held_out))


def _opens(file: Path) -> bool:
    """True if Pillow decodes the whole file."""
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True
