"""Pictures of which a small model learns the class in seconds: noise in one colour a class, no two alike."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210), "yellow": (220, 200, 40)}


def coloured(name: str, count: int, seed: int, size: int = 48) -> Iterator[bytes]:
    """`count` JPEGs of the class `name`, size x size pixels; another seed gives others."""
    rng = np.random.default_rng([seed, sorted(COLOURS).index(name)])
    for _ in range(count):
        blocks = rng.integers(-60, 60, (9, 9, 1)) + rng.integers(-20, 20, (9, 9, 3))
        pixels = np.clip(np.array(COLOURS[name]) + blocks, 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(out, "JPEG", quality=92)
        yield out.getvalue()
