"""How far apart the difference hashes of a picture's copies are, and those of different pictures; the search's time.

    python -m benchmarks.lookalikes
    python -m benchmarks.lookalikes --data /path/to/pets

Without --data on drawn pictures alone. `splits.NEAR` has to lie between what is done to a copy and the nearest two
pictures that are not copies. The search is timed with 100,000 hashes of crops of the pictures, which are as unevenly
spread as those of pictures are.
"""

import argparse
import io
import itertools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageEnhance

from local.demo.pictures import PATTERNS, pictures

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT / "functions"), str(CHECKOUT / "inference")]

from common import splits  # noqa: E402
from preprocessing import decode  # noqa: E402
from register_labels.pictures import difference_hash  # noqa: E402

Picture = Image.Image
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def pressed(picture: Picture, quality: int) -> Picture:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return decode(file.getvalue())


def scaled(picture: Picture, factor: float, how: Image.Resampling) -> Picture:
    return picture.resize((max(8, round(picture.width * factor)), max(8, round(picture.height * factor))), how)


def cropped(picture: Picture, share: float) -> Picture:
    x, y = round(picture.width * share), round(picture.height * share)
    return picture.crop((x, y, picture.width - x, picture.height - y))


COPIES: dict[str, Callable[[Picture], Picture]] = {
    "JPEG, quality 50": lambda p: pressed(p, 50),
    "JPEG, quality 20": lambda p: pressed(p, 20),
    "half the size": lambda p: scaled(p, 0.5, Image.Resampling.LANCZOS),
    "twice the size": lambda p: scaled(p, 2, Image.Resampling.BICUBIC),
    "20 % brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.2),
    "25 % darker": lambda p: ImageEnhance.Brightness(p).enhance(0.75),
    "30 % more contrast": lambda p: ImageEnhance.Contrast(p).enhance(1.3),
    "in grey": lambda p: p.convert("L").convert("RGB"),
    "turned by 1 degree": lambda p: p.rotate(1, Image.Resampling.BICUBIC),
    "1 % cut off each side": lambda p: cropped(p, 0.01),
    "2 % cut off each side": lambda p: cropped(p, 0.02),
    "5 % cut off each side": lambda p: cropped(p, 0.05),
    "mirrored": lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def measure(title: str, found: list[Picture]) -> None:
    hashes = [difference_hash(picture) for picture in found]
    apart = sorted(distance(one, other) for one, other in itertools.combinations(hashes, 2))
    print(
        f"\n{title}: {len(found)} pictures, {len(apart):,} pairs; the nearest two differ in {apart[0]} bits, ", end=""
    )
    print(
        f"half of the pairs in {apart[len(apart) // 2]} or more; {sum(d <= splits.NEAR for d in apart)} pairs are near"
    )
    print(f"  {'a copy that is':<24}{'median':>8}{'95 %':>6}{'most':>6}{'near':>8}")
    for name, change in COPIES.items():
        far = sorted(distance(difference_hash(change(p)), hash) for p, hash in zip(found, hashes, strict=True))
        near = sum(d <= splits.NEAR for d in far) / len(far)
        print(f"  {name:<24}{far[len(far) // 2]:>8}{far[len(far) * 95 // 100]:>6}{far[-1]:>6}{near:>8.1%}")


def time_search(found: list[Picture], count: int) -> None:
    chance = random.Random(0)
    small = [picture.convert("L").resize((96, 96)) for picture in found]
    hashes: dict[str, str] = {}
    while len(hashes) < count:
        side = chance.uniform(0.3, 1) * 96
        left, top = chance.uniform(0, 96 - side), chance.uniform(0, 96 - side)
        picture = chance.choice(small).crop((round(left), round(top), round(left + side), round(top + side)))
        hashes[difference_hash(picture)] = f"class {len(hashes) % 37}"
    started = time.monotonic()
    dealt, _ = splits.assign(hashes, splits.Splits())
    print(f"\n{count:,} pictures dealt in {time.monotonic() - started:.1f} s, ", end="")
    known = splits.Splits(dict(itertools.islice(dealt.of.items(), count - 1000)), dealt.dealt)
    started = time.monotonic()
    splits.assign(hashes, known)
    print(f"the last 1,000 of them behind the others in {time.monotonic() - started:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with a folder of pictures for each class")
    parser.add_argument("--count", type=int, default=100_000, help="hashes to search (100,000)")
    arguments = parser.parse_args()
    drawn = [decode(data) for seed, name in enumerate(PATTERNS) for data in pictures(name, 100, seed)]
    measure("Drawn", drawn)
    if arguments.data:
        files = sorted(path for path in arguments.data.glob("*/*") if path.suffix.lower() in SUFFIXES)
        drawn = [decode(path.read_bytes()) for path in files]
        measure(arguments.data.name, drawn)
    time_search(drawn, arguments.count)


if __name__ == "__main__":
    main()
