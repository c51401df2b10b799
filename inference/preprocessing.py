"""From the bytes of a picture file to the square RGB crop that the model sees: the one definition of it.

Training, evaluation, the Lambda functions and the serving container all import this file, so that a picture means
the same pixels to each of them, bit for bit. It needs Pillow and nothing else. What the steps are set to travels
with every model as `preprocess.json` (`Preprocess`); a file that can never become a crop is a `BrokenImage`, whose
text is the reason in words that its owner understands.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from typing import NamedTuple

from PIL import (  # noqa: F401  imported here, or the first odd file of a process pays for loading every plugin
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")  # a closed list: EPS would start Ghostscript
MAX_BYTES = 100_000_000
MAX_PIXELS = 120_000_000  # above the largest common sensors (102 megapixels), 480 MB when decoded
MIN_SIDE = 8  # pixels; below it there is nothing to classify (tracking pixels, spacers)

# The limit is checked in `_open`, before anything is decoded and with a reason that names the size.
Image.MAX_IMAGE_PIXELS = None

_INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ORIENTATION = 0x0112  # EXIF tag
_Turn = Image.Transpose
_UPRIGHT = {  # EXIF orientation: what makes it upright, and whether that swaps the axes, mirrors x, mirrors y
    2: (_Turn.FLIP_LEFT_RIGHT, False, True, False),
    3: (_Turn.ROTATE_180, False, True, True),
    4: (_Turn.FLIP_TOP_BOTTOM, False, False, True),
    5: (_Turn.TRANSPOSE, True, False, False),
    6: (_Turn.ROTATE_270, True, True, False),
    7: (_Turn.TRANSVERSE, True, True, True),
    8: (_Turn.ROTATE_90, True, False, True),
}
_SIGNATURES = (  # offset, bytes, format
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WebP"),
    (4, b"ftypavi", "AVIF"),
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
)


class BrokenImage(ValueError):
    """The file can never be classified. The text says why."""


@dataclass(frozen=True)
class Preprocess:
    """Shorter side to `resize` pixels, then the central `size` by `size`.

    `mean` and `std` are those of channels in 0..1; they are applied inside the exported model, not here.
    """

    size: int
    resize: int
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        if not 0 < self.size <= self.resize:
            raise ValueError(f"preprocess: size {self.size} must be positive and at most resize {self.resize}")
        if self.interpolation not in _INTERPOLATIONS:
            known = ", ".join(_INTERPOLATIONS)
            raise ValueError(f"preprocess: interpolation {self.interpolation!r} is none of {known}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"preprocess: mean {self.mean} and std {self.std} must have 3 numbers, std positive")

    @classmethod
    def default(cls, size: int = 224) -> Preprocess:
        """ImageNet's customary evaluation crop, 256 to 224, at the proportions of any other size."""
        return cls(size=size, resize=round(size * 256 / 224))

    @classmethod
    def from_json(cls, text: str | bytes) -> Preprocess:
        """Reads preprocess.json. ValueError when a setting is missing, unknown or out of range."""
        settings = json.loads(text)
        names = {field.name for field in fields(cls)}
        if not isinstance(settings, dict) or set(settings) != names:
            raise ValueError(f"preprocess.json must hold exactly {', '.join(sorted(names))}; it holds {text!r:.300}")
        return cls(**settings)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class Crop(NamedTuple):
    """A prepared picture: `pixels` are size*size*3 bytes (RGB, row by row); the rest describes the upright original."""

    pixels: bytes
    width: int
    height: int
    format: str


class _Decoded(NamedTuple):
    image: Image.Image  # RGB, upright, perhaps at a fraction of the original's size
    extent: tuple[float, float, float, float]  # where in `image` the original lies, see `_decode`
    size: tuple[int, int]  # of the upright original
    format: str


def decode(
    data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> Image.Image:
    """The picture in full size as upright RGB. BrokenImage with the reason when it is none."""
    return _decode(data, None, max_bytes, max_pixels, min_side).image


def crop(data: bytes, spec: Preprocess) -> bytes:
    """size*size*3 bytes of RGB, row by row. BrokenImage with the reason when the file is no whole picture."""
    return prepare(data, spec).pixels


def prepare(
    data: bytes,
    spec: Preprocess,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
) -> Crop:
    """The crop with the upright original's width, height and format.

    Equal to torchvision's Resize(resize) and CenterCrop(size) on the upright RGB picture, with one Pillow resize.
    A JPEG whose shorter side is four times `resize` or more is decoded at a half, a quarter or an eighth of its size,
    which changes a pixel of a photograph by a quarter of a level on average.
    """
    decoded = _decode(data, 2 * spec.resize, max_bytes, max_pixels, min_side)
    pixels = _crop(decoded, spec).tobytes()
    return Crop(pixels, *decoded.size, decoded.format)


class _Span(NamedTuple):
    """How one axis is resized: [start, stop) of the source to `length` pixels, those from `offset` on being kept."""

    start: float
    stop: float
    length: int
    offset: int


def _span(source: float, resized: int, size: int, exact: bool) -> _Span:
    """The central `size` of an axis of `source` pixels that is resized to `resized`.

    The reference resizes to whole pixels, then crops at whole pixels; computing with fractions is half a pixel off.
    Pillow takes the ends of the part to resize as 32-bit floats. Where they don't fit, a pixel in a thousand differs
    by one level: where `exact` is asked for, the whole axis is resized then.
    """
    offset = round((resized - size) / 2)
    ends = (offset * source / resized, (offset + size) * source / resized)
    rounded = struct.unpack("ff", struct.pack("ff", *ends))
    if exact and (rounded[0] * resized, rounded[1] * resized) != (offset * source, (offset + size) * source):
        return _Span(0, source, resized, offset)
    return _Span(*ends, size, 0)


def _crop(decoded: _Decoded, spec: Preprocess) -> Image.Image:
    width, height = decoded.size
    short = min(width, height)
    image, (x0, y0, x1, y1) = decoded.image, decoded.extent
    # At a fraction of its size a JPEG is not exact anyway, and a strip costs too much as a whole.
    exact = image.size == decoded.size and max(width, height) < 10 * short
    x = _span(x1 - x0, int(spec.resize * width / short), spec.size, exact)
    y = _span(y1 - y0, int(spec.resize * height / short), spec.size, exact)
    box = (x0 + x.start, y0 + y.start, min(x0 + x.stop, image.width), min(y0 + y.stop, image.height))
    resized = image.resize((x.length, y.length), _INTERPOLATIONS[spec.interpolation], box=box)
    return resized.crop((x.offset, y.offset, x.offset + spec.size, y.offset + spec.size))


def _decode(data: bytes, at_least: int | None, max_bytes: int, max_pixels: int, min_side: int) -> _Decoded:
    """`at_least`: the shorter side that is enough; a JPEG is then decoded at a fraction of its size."""
    if not data:
        raise BrokenImage("empty object")
    if len(data) > max_bytes:
        raise BrokenImage(f"larger than {_megabytes(max_bytes)}: {_megabytes(len(data))}")
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise BrokenImage(f"decompression bomb: {width}x{height} pixels; the limit is {max_pixels:,} pixels")
    if min(width, height) < min_side:
        raise BrokenImage(f"{width}x{height} pixels; the shorter side must have at least {min_side}")
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with a second picture behind it
    try:
        drafted = image.draft(None, (at_least, at_least)) if at_least else None
        image.load()
        if kind == "TIFF":
            width, height = image.size  # Pillow has turned it upright
        rgb = _to_rgb(image)
        orientation = _orientation(image)
    except MemoryError:
        raise  # the machine's trouble, not the file's
    except Exception as error:  # decoders raise nearly anything on damaged data, and memory is all they read
        raise BrokenImage(_reason(kind, data, error)) from error
    # A quarter of 4001 pixels is 1000.25 pixels in a picture 1001 wide: the rest of the last column is padding.
    x1, y1 = drafted[1][2:] if drafted else rgb.size
    if orientation not in _UPRIGHT:
        return _Decoded(rgb, (0, 0, x1, y1), (width, height), kind)
    turn, swap, mirror_x, mirror_y = _UPRIGHT[orientation]
    rgb = rgb.transpose(turn)
    if swap:
        x1, y1, width, height = y1, x1, height, width
    x0, y0 = (rgb.width - x1 if mirror_x else 0), (rgb.height - y1 if mirror_y else 0)
    return _Decoded(rgb, (x0, y0, x0 + x1, y0 + y1), (width, height), kind)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Exception as error:  # UnidentifiedImageError, and whatever a plugin lets through on a damaged header
        kind = next((kind for at, signature, kind in _SIGNATURES if data[at : at + len(signature)] == signature), None)
        if kind is None:
            raise BrokenImage("not an image: the content is no JPEG, PNG, WebP, AVIF, GIF, TIFF or BMP") from error
        found = f"it begins as {kind}, but has no readable header ({_size(len(data))})"
        raise BrokenImage(f"truncated or damaged: {found}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable metadata does not make a picture unreadable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        image = _levels(image.convert("I"), 0, 65535)
    elif image.mode in ("I", "F"):
        low, high = image.getextrema()
        if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and math.isfinite(high - low)):
            raise ValueError("pixel values that are no finite numbers")
        # 16 bits in a wider type, as a rule. Anything else is a measurement, of which only the range is known.
        sixteen_bits = low >= 0 and 255 < high <= 65535
        image = _levels(image, 0, 65535) if sixteen_bits else _levels(image, min(low, 0), max(high, 255))
    if image.has_transparency_data:
        # Over white, which cut-outs are mostly shown on; the colour under full transparency is arbitrary.
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _levels(image: Image.Image, low: float, high: float) -> Image.Image:
    """A picture of mode I or F as 8 bits: `low` becomes 0 and `high` 255."""
    scale = 255 / (high - low)
    offset = 0.5 - low * scale
    return image.point(lambda level: level * scale + offset).convert("L")


def _reason(kind: str, data: bytes, error: Exception) -> str:
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return f"truncated: the {kind} ends after {_size(len(data))}, in the middle of the picture"
    return f"damaged: the {kind} of {_size(len(data))} cannot be decoded ({error})"


def _size(count: int) -> str:
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1000:,.0f} kB"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.4g} MB" if count >= 1e5 else f"{count:,} bytes"
