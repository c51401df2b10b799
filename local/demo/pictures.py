"""Draws dogs, for a demo that must run where no data set can be downloaded.

The class of a picture is the *pattern* of the coat (spotted, brindle, merle …) and nothing else: colours, pose, build,
ears, tail, size, light, background, blur and noise are drawn from the same distributions for every class, and which of
the two coat colours is the marking is a coin toss. So a classifier that does well has learnt to see a pattern.

Everything follows from the random generator that is passed in: the same seed gives the same picture.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Point = tuple[float, float]
Capsule = tuple[Point, Point, float, float]  # from, to, radius at each end

SUPERSAMPLING = 2  # shapes are drawn this many times larger, and scaled down for smooth edges

COAT_COLOURS = {
    "white": (240, 236, 228),
    "cream": (228, 205, 166),
    "apricot": (224, 170, 112),
    "golden": (203, 146, 73),
    "red": (158, 82, 42),
    "chocolate": (96, 58, 40),
    "liver": (122, 80, 68),
    "silver": (178, 180, 186),
    "blue": (110, 122, 140),
    "charcoal": (68, 68, 74),
    "black": (38, 36, 40),
}
COLLARS = [(200, 48, 52), (38, 110, 190), (236, 178, 40), (60, 150, 96), (150, 84, 170), (236, 118, 60)]


@dataclass
class Dog:
    """One dog's shape, in a unit square: x to where it looks, y down, its paws on y = `ground`."""

    torso: list[Point]
    back: list[Point]  # along the spine, where a saddle lies
    chest: Point
    neck: Capsule
    head: Point
    head_radius: float
    snout: Capsule
    ear: list[Point]
    tail: list[Point]
    tail_radius: float
    near_legs: list[Capsule]
    far_legs: list[Capsule]
    paws: list[Point]
    ground: float


def _leg(x: float, top: float, ground: float, swing: float, bend: float, thick: float) -> tuple[list[Capsule], Point]:
    """A leg of two capsules and a paw; `swing` moves the paw, `bend` the middle joint."""
    joint = (x + swing * 0.45 + bend, (top + ground) / 2)
    ankle = (x + swing, ground - 0.025)
    toe = (ankle[0] + 0.03, ground - 0.02)
    return [
        ((x, top), joint, thick, thick * 0.72),
        (joint, ankle, thick * 0.72, thick * 0.58),
        (ankle, toe, thick * 0.6, thick * 0.55),
    ], ankle


def _standing(rng: np.random.Generator) -> Dog:
    plump = rng.uniform(0.85, 1.25)
    legs = rng.uniform(0.17, 0.33)  # length, from dachshund to hound
    middle, ground = 0.5, 0.5 + 0.10 * plump + legs
    stride = rng.uniform(0.0, 0.075)
    thick = rng.uniform(0.034, 0.05)

    def body(x: float, y: float) -> Point:
        return x, middle + (y - 0.5) * plump

    torso = [
        body(*p)
        for p in [
            (0.72, 0.42),
            (0.62, 0.375),
            (0.45, 0.39),
            (0.27, 0.38),
            (0.19, 0.46),
            (0.21, 0.57),
            (0.33, 0.59),
            (0.47, 0.605),
            (0.62, 0.635),
            (0.735, 0.56),
        ]
    ]
    top = middle + 0.06 * plump
    near, far, paws = [], [], []
    for x, bend, sign in [(0.665, 0.0, 1.0), (0.255, -0.035, -1.0)]:
        capsules, paw = _leg(x, top, ground, stride * sign, bend, thick * (1.0 if sign > 0 else 1.1))
        near += capsules
        paws.append(paw)
        capsules, paw = _leg(x + 0.045, top, ground - 0.012, -stride * sign + 0.01, bend, thick)
        far += capsules
        paws.append(paw)
    near.append((body(0.255, 0.48), body(0.265, 0.53), 0.085 * plump, 0.07 * plump))
    return _with_head(
        rng,
        torso,
        [body(0.24, 0.40), body(0.42, 0.39), body(0.6, 0.385)],
        body(0.70, 0.55),
        body(0.66, 0.46),
        body(0.205, 0.42),
        near,
        far,
        paws,
        ground,
    )


def _sitting(rng: np.random.Generator) -> Dog:
    ground, plump = 0.88, rng.uniform(0.9, 1.2)
    thick = rng.uniform(0.034, 0.046)
    torso = [
        (0.66, 0.47),
        (0.58, 0.40),
        (0.47 - 0.03 * plump, 0.50),
        (0.34 - 0.03 * plump, 0.64),
        (0.27, 0.80),
        (0.36, 0.87),
        (0.52, 0.85),
        (0.62, 0.74),
        (0.68, 0.60),
    ]
    near, first = _leg(0.625, 0.60, ground, rng.uniform(-0.01, 0.03), 0.0, thick)
    far, second = _leg(0.665, 0.60, ground - 0.012, rng.uniform(0.0, 0.04), 0.0, thick)
    near += [
        ((0.375, 0.745), (0.41, 0.80), 0.105 * plump, 0.07),
        ((0.38, ground - 0.025), (0.51, ground - 0.02), 0.03, 0.026),
    ]
    return _with_head(
        rng,
        torso,
        [(0.30, 0.76), (0.40, 0.575), (0.55, 0.43)],
        (0.655, 0.58),
        (0.60, 0.49),
        (0.275, 0.82),
        near,
        far,
        [first, second, (0.50, ground - 0.02)],
        ground,
        tail_low=True,
    )


def _with_head(
    rng: np.random.Generator,
    torso: list[Point],
    back: list[Point],
    chest: Point,
    shoulder: Point,
    rump: Point,
    near: list[Capsule],
    far: list[Capsule],
    paws: list[Point],
    ground: float,
    tail_low: bool = False,
) -> Dog:
    """Adds head, ear, and tail, each of a random breed, to a body."""
    radius = rng.uniform(0.088, 0.116)
    lean = rng.uniform(0.05, 0.14)
    head = (shoulder[0] + lean, shoulder[1] - rng.uniform(0.17, 0.24))
    nod = rng.uniform(-0.2, 0.45)
    length = rng.uniform(0.07, 0.14)
    start = (head[0] + radius * 0.45, head[1] + radius * 0.28)
    snout = (
        start,
        (start[0] + length * math.cos(nod), start[1] + length * math.sin(nod)),
        radius * 0.58,
        radius * 0.42,
    )

    x, y = head[0] - radius * 0.35, head[1] - radius * 0.5
    drop = rng.uniform(1.1, 1.8) * radius
    kind = rng.integers(3)
    if kind == 0:  # hanging
        ear = [
            (x + 0.03, y - 0.01),
            (x - 0.03, y + 0.01),
            (x - 0.06, y + drop * 0.7),
            (x - 0.025, y + drop),
            (x + 0.02, y + drop * 0.55),
        ]
    elif kind == 1:  # pricked
        ear = [
            (x + 0.045, y + 0.015),
            (x + 0.012, y - drop * 0.45),
            (x - 0.02, y - drop * 0.62),
            (x - 0.04, y - drop * 0.2),
            (x - 0.035, y + 0.035),
        ]
    else:  # folded
        ear = [
            (x + 0.03, y - 0.01),
            (x - 0.015, y - 0.035),
            (x - 0.07, y + 0.01),
            (x - 0.085, y + drop * 0.4),
            (x - 0.02, y + drop * 0.3),
        ]

    reach = rng.uniform(0.10, 0.19)
    if tail_low:
        bends = [rump, (rump[0] - reach * 0.6, rump[1] + 0.03), (rump[0] - reach, rump[1] - rng.uniform(-0.03, 0.08))]
    else:
        lift = rng.uniform(-0.16, 0.28)
        curl = rng.uniform(-0.3, 0.7)
        bends = [rump, (rump[0] - reach * 0.8, rump[1] - lift * 0.5), (rump[0] - reach * (1 - curl), rump[1] - lift)]
    tail = [_bezier(bends, t) for t in np.linspace(0, 1, 9)]
    return Dog(
        torso,
        back,
        chest,
        (shoulder, (head[0] - 0.01, head[1] + 0.02), radius * 1.05, radius * 0.82),
        head,
        radius,
        snout,
        ear,
        tail,
        rng.uniform(0.016, 0.03),
        near,
        far,
        paws,
        ground,
    )


def _bezier(p: list[Point], t: float) -> Point:
    a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
    return a * p[0][0] + b * p[1][0] + c * p[2][0], a * p[0][1] + b * p[1][1] + c * p[2][1]


def _smooth(points: list[Point], steps: int = 6) -> list[Point]:
    """A closed Catmull-Rom curve through the points."""
    p = np.array(points)
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    curve = 0.5 * (
        2 * p
        + (after - before) * t
        + (2 * before - 5 * p + 4 * after - beyond) * t**2
        + (3 * p - before - 3 * after + beyond) * t**3
    )
    return [tuple(q) for q in curve.transpose(1, 0, 2).reshape(-1, 2)]


class Canvas:
    """Draws a dog's shapes into single-channel images: mirrored, turned, scaled and placed once, for all of them."""

    def __init__(self, rng: np.random.Generator, size: int, dog: Dog):
        self.size, self.rng = size, rng
        self.pixels = size * SUPERSAMPLING
        self.scale = rng.uniform(0.82, 1.06)
        self.mirror = -1.0 if rng.random() < 0.5 else 1.0
        angle = rng.normal(0, 0.07)
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        self.x = 0.5 + rng.uniform(-0.06, 0.06)
        self.y = 0.5 + rng.uniform(-0.05, 0.05)
        self.middle = ((dog.head[1] - 0.08) + dog.ground) / 2

    def at(self, point: Point) -> Point:
        """From the dog's square to pixels."""
        x, y = (point[0] - 0.53) * self.mirror * self.scale, (point[1] - self.middle) * self.scale
        return (
            (x * self.cos - y * self.sin + self.x) * self.pixels,
            (x * self.sin + y * self.cos + self.y) * self.pixels,
        )

    def blank(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        image = Image.new("L", (self.pixels, self.pixels))
        return image, ImageDraw.Draw(image)

    def disc(self, draw: ImageDraw.ImageDraw, centre: Point, radius: float, fill: int, squash: float = 1.0) -> None:
        x, y = self.at(centre)
        r = radius * self.scale * self.pixels
        draw.ellipse((x - r, y - r * squash, x + r, y + r * squash), fill=fill)

    def capsule(self, draw: ImageDraw.ImageDraw, capsule: Capsule, fill: int) -> None:
        """A limb: two discs and the quadrangle between them."""
        start, end, r0, r1 = capsule
        self.disc(draw, start, r0, fill)
        self.disc(draw, end, r1, fill)
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = math.hypot(dx, dy) or 1e-6
        nx, ny = -dy / length, dx / length
        draw.polygon(
            [
                self.at(p)
                for p in [
                    (start[0] + nx * r0, start[1] + ny * r0),
                    (end[0] + nx * r1, end[1] + ny * r1),
                    (end[0] - nx * r1, end[1] - ny * r1),
                    (start[0] - nx * r0, start[1] - ny * r0),
                ]
            ],
            fill=fill,
        )

    def polygon(self, draw: ImageDraw.ImageDraw, points: list[Point], fill: int) -> None:
        draw.polygon([self.at(p) for p in _smooth(points)], fill=fill)

    def array(self, image: Image.Image) -> np.ndarray:
        """float32 [size, size], 0 to 1, scaled down to the picture."""
        return np.asarray(image.reduce(SUPERSAMPLING), np.float32) / 255

    def noise(self, cells: float) -> np.ndarray:
        """float32 [size, size] about 0 to 1: smooth noise with this many bumps across the dog."""
        n = max(2, round(cells / self.scale))
        grid = Image.fromarray(self.rng.random((n + 2, n + 2), np.float32))
        return np.asarray(
            grid.resize((self.size, self.size), Image.Resampling.BICUBIC, box=(0.5, 0.5, n + 1.5, n + 1.5))
        )

    def along(self) -> np.ndarray:
        """float32 [size, size]: the dog's x at every pixel, in its own square."""
        x = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size - self.x
        y = (np.arange(self.size, dtype=np.float32)[:, None] + 0.5) / self.size - self.y
        return (x * self.cos + y * self.sin) / self.scale


def _above(values: np.ndarray, threshold: np.ndarray | float, softness: float) -> np.ndarray:
    """A step at the threshold with an edge `softness` wide, 0 to 1."""
    return np.clip((values - threshold) / softness + 0.5, 0, 1)


# Each pattern says how much of the marking colour there is at each pixel: float32 [size, size], 0 to 1.


def _solid(dog: Dog, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    return 0.18 * (canvas.noise(4) - 0.5).clip(0)


def _spotted(dog: Dog, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    image, draw = canvas.blank()
    low, high = rng.uniform(0.017, 0.026), rng.uniform(0.032, 0.046)
    step = rng.uniform(0.082, 0.105)
    for row, y in enumerate(np.arange(0.02, 1.0, step)):
        for x in np.arange(0.05 + (row % 2) * step / 2, 1.05, step):
            if rng.random() < 0.88:
                centre = (x + rng.normal(0, step * 0.16), y + rng.normal(0, step * 0.16))
                canvas.disc(draw, centre, rng.uniform(low, high), 255, rng.uniform(0.75, 1.2))
    return canvas.array(image)


def _brindle(dog: Dog, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    stripes = rng.uniform(11, 16)
    warp = (canvas.noise(4) - 0.5) * rng.uniform(0.7, 1.3) + (canvas.noise(11) - 0.5) * 0.35
    slant = np.linspace(0, rng.uniform(-2, 2), canvas.size, dtype=np.float32)[:, None]
    wave = np.sin(2 * np.pi * (canvas.along() * stripes + warp + slant))
    return _above(wave + (canvas.noise(16) - 0.5) * 1.1, rng.uniform(-0.1, 0.3), 0.7)


def _merle(dog: Dog, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    ragged = canvas.noise(7) + 0.55 * canvas.noise(16) + 0.4 * canvas.noise(34)
    order = np.sort(ragged, axis=None)
    dark, mid = order[int(order.size * rng.uniform(0.66, 0.76))], order[int(order.size * rng.uniform(0.36, 0.46))]
    return 0.38 * _above(ragged, mid, 0.2) + 0.62 * _above(ragged, dark, 0.08)


def _piebald(dog: Dog, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    image, draw = canvas.blank()
    spine = dog.back
    flank = ((spine[1][0] + dog.chest[0]) / 2, spine[1][1] + 0.07)
    places = [spine[0], flank, dog.tail[-3]]
    for x, y in [dog.head, *(places[i] for i in rng.permutation(3)[: rng.integers(1, 4)])]:
        for _ in range(3):
            centre = (x + rng.normal(0, 0.03), y + rng.normal(0, 0.03))
            canvas.disc(draw, centre, rng.uniform(0.075, 0.12), 255, rng.uniform(0.75, 1.2))
    return _ragged(canvas, image, 0.25)


def _saddle(dog: Dog, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    image, draw = canvas.blank()
    radius = rng.uniform(0.095, 0.125)
    canvas.capsule(draw, (dog.back[0], dog.back[1], radius * 0.85, radius), 255)
    canvas.capsule(draw, (dog.back[1], dog.back[2], radius, radius * 0.85), 255)
    if rng.random() < 0.5:  # often the upper side of the tail is of the saddle's colour
        for a, b in zip(dog.tail[:5], dog.tail[1:6], strict=True):
            canvas.capsule(draw, (a, b, 0.03, 0.03), 255)
    return _ragged(canvas, image, 0.35)


def _tuxedo(dog: Dog, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    image, draw = canvas.blank()
    x, y = dog.chest
    canvas.capsule(
        draw,
        (
            (dog.neck[1][0] + 0.05, dog.neck[1][1] + 0.08),
            (x, y + rng.uniform(0.02, 0.07)),
            0.055,
            rng.uniform(0.07, 0.09),
        ),
        255,
    )
    for paw in dog.paws:
        canvas.capsule(draw, (paw, (paw[0], paw[1] - rng.uniform(0.03, 0.09)), 0.06, 0.05), 255)
    (start, end, _, _) = dog.snout
    canvas.capsule(draw, (start, end, dog.head_radius * 0.5, dog.head_radius * 0.7), 255)
    if rng.random() < 0.6:
        canvas.disc(draw, dog.tail[-1], 0.05, 255)
    return _ragged(canvas, image, 0.2)


def _belted(dog: Dog, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """One broad band around the middle of the body."""
    middle = (dog.back[0][0] + dog.chest[0]) / 2 + rng.normal(0, 0.012)
    width, slant = rng.uniform(0.13, 0.18), rng.uniform(-0.12, 0.12)
    rows, columns = np.mgrid[0 : canvas.size, 0 : canvas.size].astype(np.float32) / canvas.size
    inside = np.abs(columns - middle - slant * (rows - dog.back[1][1])) - (canvas.noise(14) - 0.5) * 0.04
    return 1 - _above(inside, width / 2, 0.015)


def _ragged(canvas: Canvas, image: Image.Image, roughness: float) -> np.ndarray:
    """A drawn shape with the edge of fur."""
    soft = image.filter(ImageFilter.BoxBlur(canvas.pixels * 0.018))
    return _above(canvas.array(soft) + (canvas.noise(22) - 0.5) * roughness * 2, 0.5, 0.16)


PATTERNS: dict[str, Callable[[Dog, Canvas, np.random.Generator], np.ndarray]] = {
    "brindle": _brindle,
    "merle": _merle,
    "piebald": _piebald,
    "saddle": _saddle,
    "solid": _solid,
    "spotted": _spotted,
    "tuxedo": _tuxedo,
    "belted": _belted,  # the last one: a pattern's place is part of its pictures' seed
}


def _two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Base and marking colour of a coat: float32 [3] each, far enough apart in lightness to be told apart."""
    colours = np.array(list(COAT_COLOURS.values()), np.float32)
    while True:
        pair = (
            colours[rng.choice(len(colours), 2, replace=False)]
            * rng.uniform(0.88, 1.06, (2, 1))
            * rng.uniform(0.97, 1.03, (2, 3))
        )
        lightness = pair @ np.array([0.3, 0.59, 0.11])
        if abs(lightness[0] - lightness[1]) > 90:
            return pair[0].astype(np.float32), pair[1].astype(np.float32)


def _background(rng: np.random.Generator, canvas: Canvas, ground: float) -> np.ndarray:
    """float32 [size, size, 3]: somewhere a dog may be, out of focus."""
    size = canvas.size
    scenes = [  # far, near
        ((168, 206, 236), (112, 156, 74)),  # meadow
        ((206, 224, 238), (232, 236, 242)),  # snow
        ((158, 204, 220), (222, 200, 158)),  # beach
        ((226, 214, 196), (168, 122, 84)),  # parquet
        ((196, 208, 196), (142, 146, 150)),  # street
        ((112, 130, 104), (120, 96, 66)),  # forest
        ((74, 84, 116), (62, 74, 72)),  # dusk
    ]
    far, near = (
        np.array(c, np.float32) * rng.uniform(0.82, 1.08) * rng.uniform(0.95, 1.05, 3).astype(np.float32)
        for c in scenes[rng.integers(len(scenes))]
    )
    horizon = ground - rng.uniform(0.02, 0.30)
    rows = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    below = _above(rows + (canvas.noise(5) - 0.5) * rng.uniform(0, 0.06), horizon, rng.uniform(0.015, 0.08))[..., None]
    picture = far * (1.08 - 0.25 * rows[..., None]) * (1 - below) + near * (0.85 + 0.3 * rows[..., None]) * below
    picture += ((canvas.noise(9) - 0.5) * rng.uniform(8, 44))[..., None]
    picture += ((canvas.noise(36) - 0.5) * rng.uniform(4, 46))[..., None] * below
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.integers(0, 9)):  # trees, lamps, bushes: blobs of any colour
        x, r = rng.uniform(0, size), rng.uniform(0.02, 0.13) * size
        y = rng.uniform(0, horizon) * size
        tone = tuple(int(v) for v in (far * 0.6 + near * 0.4) * rng.uniform(0.55, 1.35) * rng.uniform(0.85, 1.15, 3))
        draw.ellipse(
            (x - r, y - r * rng.uniform(0.6, 1.6), x + r, y + r),
            fill=(*(min(255, v) for v in tone), int(rng.integers(60, 190))),
        )
    return np.asarray(image.filter(ImageFilter.BoxBlur(size * rng.uniform(0.004, 0.022))), np.float32)


def draw(pattern: str, rng: np.random.Generator, size: int = 160) -> Image.Image:
    """A dog whose coat has this pattern, as an RGB image of `size` pixels square.

    Raises KeyError for a pattern that is not in PATTERNS.
    """
    dog = _standing(rng) if rng.random() < 0.7 else _sitting(rng)
    canvas = Canvas(rng, size, dog)
    base, marking = _two_colours(rng)

    # Grey levels are heights: a limb in front of the body gets an edge from the light, like the body itself.
    image, pen = canvas.blank()
    for leg in dog.far_legs:
        canvas.capsule(pen, leg, 90)
    far = canvas.array(image) > 0.2
    for i, (a, b) in enumerate(zip(dog.tail[:-1], dog.tail[1:], strict=True)):
        taper = 1.15 - 0.07 * i
        canvas.capsule(pen, (a, b, dog.tail_radius * taper, dog.tail_radius * (taper - 0.07)), 140)
    canvas.polygon(pen, dog.torso, 165)
    for leg in dog.near_legs:
        canvas.capsule(pen, leg, 185)
    canvas.capsule(pen, dog.neck, 185)
    canvas.disc(pen, dog.head, dog.head_radius, 205)
    canvas.capsule(pen, dog.snout, 215)
    canvas.polygon(pen, dog.ear, 255)
    flap, pen = canvas.blank()
    canvas.polygon(pen, dog.ear, 255)
    mask = canvas.array(image.point(lambda v: 255 if v else 0))
    height = canvas.array(image.filter(ImageFilter.BoxBlur(canvas.pixels * 0.012)))

    ground = canvas.at((0.5, dog.ground))[1] / canvas.pixels
    picture = _background(rng, canvas, ground)
    shadow, pen = canvas.blank()
    x, y = canvas.at((0.47, dog.ground))
    r = 0.34 * canvas.scale * canvas.pixels
    pen.ellipse((x - r, y - r * 0.14, x + r, y + r * 0.14), fill=int(rng.integers(70, 150)))
    picture *= 1 - canvas.array(shadow.filter(ImageFilter.BoxBlur(canvas.pixels * 0.02)))[..., None]

    amount = PATTERNS[pattern](dog, canvas, rng)[..., None]
    coat = base + (marking - base) * amount
    coat = coat + ((canvas.noise(70) - 0.5) * 22)[..., None]  # fur
    slope_y, slope_x = np.gradient(height)
    side = rng.uniform(-1, 1)
    light = 1 + (slope_y * 1.2 + slope_x * side) * (size / 128) * rng.uniform(1.2, 2.2) - 0.28 * (far & (height < 0.5))
    light -= 0.14 * canvas.array(flap)
    coat = coat * np.clip(light, 0.5, 1.45)[..., None]
    picture += (coat - picture) * mask[..., None]

    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    _face(image, dog, canvas, rng)
    return _photograph(image, rng, canvas)


def _face(image: Image.Image, dog: Dog, canvas: Canvas, rng: np.random.Generator) -> None:
    """Eye, nose, mouth, and for most dogs a collar: drawn on the picture itself."""
    pen = ImageDraw.Draw(image, "RGBA")
    unit = canvas.scale * canvas.size

    def at(p: Point) -> Point:
        x, y = canvas.at(p)
        return x / SUPERSAMPLING, y / SUPERSAMPLING

    def dot(p: Point, r: float, colour: tuple[int, ...]) -> None:
        x, y = at(p)
        r = max(0.5, r * unit)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    (hx, hy), r = dog.head, dog.head_radius
    start, tip, _, end = dog.snout
    if rng.random() < 0.75:
        (ax, ay), (bx, by), _, _ = dog.neck
        cx, cy = ax + (bx - ax) * 0.5, ay + (by - ay) * 0.5
        length = math.hypot(bx - ax, by - ay) or 1e-6
        nx, ny = -(by - ay) / length * r * 0.92, (bx - ax) / length * r * 0.92
        colour = COLLARS[rng.integers(len(COLLARS))]
        pen.line([at((cx + nx, cy + ny)), at((cx - nx, cy - ny))], fill=colour, width=max(1, round(0.024 * unit)))
        dot((cx + abs(nx) * 0.8, cy + abs(ny) * 0.8 + 0.022), 0.013, (244, 206, 92))
    eye = (hx + r * 0.30, hy - r * 0.18)
    dot(eye, r * 0.19, (250, 246, 240, 210))
    dot((eye[0] + r * 0.03, eye[1]), r * 0.15, (32, 22, 20))
    dot((eye[0] + r * 0.08, eye[1] - r * 0.06), r * 0.05, (255, 255, 255))
    nose = (tip[0] + end * 0.72, tip[1] - end * 0.42)
    dot(nose, r * 0.2, (30, 24, 26))
    dot((nose[0] + r * 0.02, nose[1] - r * 0.07), r * 0.05, (190, 190, 196, 180))
    lip = (tip[0] + end * 0.55, tip[1] + end * 0.45)
    pen.line(
        [at(lip), at((lip[0] - r * 0.45, lip[1] + r * 0.14)), at((lip[0] - r * 0.95, lip[1] - r * 0.02))],
        fill=(40, 26, 28, 200),
        width=max(1, round(0.008 * unit)),
    )
    if rng.random() < 0.35:
        pen.ellipse(
            (
                *(v - 0.02 * unit for v in at((lip[0] - r * 0.35, lip[1] + r * 0.28))),
                *(v + 0.022 * unit for v in at((lip[0] - r * 0.35, lip[1] + r * 0.30))),
            ),
            fill=(226, 110, 118),
        )


def _photograph(image: Image.Image, rng: np.random.Generator, canvas: Canvas) -> Image.Image:
    """What a camera does: colour of the light, exposure, a gradient, focus and grain."""
    size = canvas.size
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8) * size / 128))
    picture = np.asarray(image, np.float32)
    across = np.linspace(-1, 1, size, dtype=np.float32)
    gradient = 1 + rng.uniform(-0.2, 0.2) * across[None, :, None] + rng.uniform(-0.12, 0.12) * across[:, None, None]
    warmth = rng.normal(0, 0.04)
    light = rng.uniform(0.74, 1.12) * np.array([1 + warmth, 1, 1 - warmth], np.float32)
    grain = rng.standard_normal((size, size, 1), np.float32) * rng.uniform(1, 7)
    return Image.fromarray((picture * gradient.astype(np.float32) * light + grain).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 88) -> bytes:
    """The picture as JPEG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def pictures(pattern: str, count: int, seed: int, size: int = 160) -> Iterator[bytes]:
    """`count` JPEGs of one pattern. The first n are the same whatever the count, and differ from every other seed's."""
    stream = list(PATTERNS).index(pattern)
    for number in range(count):
        rng = np.random.default_rng([seed, stream, number])
        yield jpeg(draw(pattern, rng, size), int(rng.integers(78, 94)))
