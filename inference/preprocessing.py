"""From the bytes of a picture file to the square RGB crop that the model sees: the one definition of it.

Training, evaluation, the Lambda functions and the serving container all import this file, so that a picture means
the same pixels to each of them, bit for bit. It needs Pillow, and pi-heif when a HEIC comes. What the steps are set to
travels with every model as `preprocess.json` (`Preprocess`); a file that can never become a crop is a `BrokenImage`,
whose text is the reason in words that its owner understands.

Colours are converted to sRGB where an embedded ICC profile says otherwise: relative colorimetric with black point
compensation, so that paper becomes white and the densest ink black. A profile that cannot be read, or does not fit the
picture's mode, is ignored; so are colour hints that Pillow does not hand on (gAMA, cHRM and cICP of PNG, nclx of AVIF).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from io import BytesIO
from posixpath import splitext
from typing import TYPE_CHECKING, NamedTuple

from PIL import (  # noqa: F401  imported here, or the first odd file of a process pays for loading every plugin
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")  # a closed list: EPS would start Ghostscript
MAX_BYTES = 100_000_000
MAX_PIXELS = 120_000_000  # above the largest common sensors (102 megapixels), 480 MB when decoded
MIN_SIDE = 8  # pixels; below it there is nothing to classify (tracking pixels, spacers)
# The most that a stack's parameters can be set to, for pictures that were judged by those already.
ADMITTED = {"max_bytes": 200_000_000, "max_pixels": MAX_PIXELS, "min_side": 1}

MAX_PROFILE_BYTES = 4_000_000  # larger colour profiles are ignored; those of presses have 0.5 to 3 MB
COPIED_PIXELS = 500_000  # of a picture that may be copied where that saves work: 2 MB, as `_bytes_needed` allows for

# The limit is checked in `_checked`, before anything is decoded and with a reason that names the size.
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
_SIGNATURES = (  # offset, bytes, what it is
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript document"),  # EPS with a preview
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\xff\x0a", "a JPEG XL, which is not supported"),
    (4, b"JXL \r\n\x87\n", "a JPEG XL, which is not supported"),
    (4, b"jP  \r\n\x87\n", "a JPEG 2000, which is not supported"),
    (8, b"AVI ", "a film"),
    (4, b"ftyp", "a film"),  # HEIF and AVIF, which begin so too, are told by their brands
)
_MARKUP = ((b"<svg", "an SVG drawing"), (b"<!doctype html", "a web page"), (b"<html", "a web page"))
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_EXTENSIONS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".heic", ".heif", ".hif", ".heics", ".heifs"), "HEIF"),
    ".webp": "WEBP",
    ".gif": "GIF",
}


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


class Header(NamedTuple):
    """What the first bytes of a file say. `width` and `height` are as stored, before any turning.

    `bytes_needed`: the memory that preparing it takes at its peak, beside the file itself: an upper estimate.
    """

    format: str
    width: int
    height: int
    bytes_needed: int


class _Decoded(NamedTuple):
    image: Image.Image  # upright, perhaps at a fraction of the original's size; RGB, or what `to_srgb` takes
    extent: tuple[float, float, float, float]  # where in `image` the original lies, see `_decode`
    size: tuple[int, int]  # of the upright original
    format: str
    to_srgb: ImageCmsTransform | None


def decode(
    data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> Image.Image:
    """The picture in full size as upright RGB. BrokenImage with the reason when it is none."""
    decoded = _decode(data, None, max_bytes, max_pixels, min_side)
    return _in_srgb(decoded.image, decoded.to_srgb)


def crop(data: bytes, spec: Preprocess) -> bytes:
    """size*size*3 bytes of RGB, row by row, of a picture that was accepted before, by whatever limits a stack has.

    BrokenImage with the reason when the file is no whole picture.
    """
    return prepare(data, spec, **ADMITTED).pixels


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
    which changes a pixel of a photograph by a quarter of a level on average. A colour profile is applied to the crop,
    which costs 2 ms instead of 40 a megapixel; against `decode`, which applies it to the whole picture, a photograph
    differs by a third of a level on average in Display P3 and Adobe RGB, by 0.6 in ProPhoto, by 40 in single pixels.
    """
    decoded = _decode(data, 2 * spec.resize, max_bytes, max_pixels, min_side)
    pixels = _in_srgb(_crop(decoded, spec), decoded.to_srgb).tobytes()
    return Crop(pixels, *decoded.size, decoded.format)


def inspect(
    data: bytes,
    spec: Preprocess,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
) -> Header:
    """What `prepare` would find, without decoding. BrokenImage where the first bytes already tell that it would be."""
    image = _checked(data, max_bytes, max_pixels, min_side)
    kind, (width, height) = _kind(image), image.size
    image.draft(None, (2 * spec.resize, 2 * spec.resize))
    return Header(kind, width, height, _bytes_needed(kind, image, width * height))


def extension_differs(key: str, format: str) -> str | None:
    """`named .png, is a JPEG` where the extension of `key` promises another format; None for one that promises none."""
    extension = splitext(key)[1].lower()
    if _EXTENSIONS.get(extension, format) == format:
        return None
    return f"named {extension}, is {'an' if format == 'AVIF' else 'a'} {_spoken(format)}"


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
    method = _INTERPOLATIONS[spec.interpolation]
    if (x.length, y.length) != (spec.size, spec.size) and image.width * image.height <= COPIED_PIXELS:
        return _in_two_passes(image, x, y, spec.size, method)  # whole axes have the extent of the picture
    box = (x0 + x.start, y0 + y.start, min(x0 + x.stop, image.width), min(y0 + y.stop, image.height))
    resized = image.resize((x.length, y.length), method, box=box)
    return resized.crop((x.offset, y.offset, x.offset + spec.size, y.offset + spec.size))


def _in_two_passes(image: Image.Image, x: _Span, y: _Span, size: int, method: Image.Resampling) -> Image.Image:
    """What Pillow computes, rows first and rounded in between, without those rows and columns that are cut off anyway.

    Pillow leaves out only what is outside of the box, which is nothing where a whole axis is resized. Every pixel keeps
    its coordinates, so every weight is the same number.
    """
    scale = (y.stop - y.start) / y.length
    reach = math.ceil(2 * max(scale, 1))  # bicubic looks two pixels of the coarser grid to each side, bilinear one
    start = y.start + y.offset * scale
    top, bottom = max(0, math.floor(start) - reach), min(image.height, math.ceil(start + size * scale) + reach)
    rows = image.crop((0, top, image.width, bottom))
    rows = rows.resize((x.length, rows.height), method, box=(x.start, 0, x.stop, rows.height))
    columns = Image.new(image.mode, (size, image.height))
    columns.paste(rows.crop((x.offset, 0, x.offset + size, rows.height)), (0, top))
    resized = columns.resize((size, y.length), method, box=(0, y.start, size, y.stop))
    return resized.crop((0, y.offset, size, y.offset + size))


def _decode(data: bytes, at_least: int | None, max_bytes: int, max_pixels: int, min_side: int) -> _Decoded:
    """`at_least`: the shorter side that is enough; a JPEG is then decoded at a fraction of its size."""
    image = _checked(data, max_bytes, max_pixels, min_side)
    kind, (width, height) = _kind(image), image.size
    try:
        drafted = image.draft(None, (at_least, at_least)) if at_least else None
        if kind == "JPEG" and isinstance(image, ImageFile.ImageFile):
            image.decodermaxblock = len(data)  # in one piece, which is `data` itself, instead of copies of 64 kB
        image.load()
        if kind == "TIFF":
            width, height = image.size  # Pillow has turned it upright
        to_srgb = _colours(image)
        upright = image if to_srgb and image.mode in ("CMYK", "LAB") else _to_rgb(image)
        orientation = _orientation(image)
    except MemoryError:
        raise  # the machine's trouble, not the file's
    except Exception as error:  # decoders raise nearly anything on damaged data, and memory is all they read
        if "out of memory" in str(error).lower():  # so say Pillow and libavif
            raise MemoryError(str(error)) from error
        raise BrokenImage(_reason(kind, data, error)) from error
    # A quarter of 4001 pixels is 1000.25 pixels in a picture 1001 wide: the rest of the last column is padding.
    x1, y1 = drafted[1][2:] if drafted else upright.size
    if orientation not in _UPRIGHT:
        return _Decoded(upright, (0, 0, x1, y1), (width, height), kind, to_srgb)
    turn, swap, mirror_x, mirror_y = _UPRIGHT[orientation]
    upright = upright.transpose(turn)
    if swap:
        x1, y1, width, height = y1, x1, height, width
    x0, y0 = (upright.width - x1 if mirror_x else 0), (upright.height - y1 if mirror_y else 0)
    return _Decoded(upright, (x0, y0, x0 + x1, y0 + y1), (width, height), kind, to_srgb)


def _checked(data: bytes, max_bytes: int, max_pixels: int, min_side: int) -> Image.Image:
    """The picture, opened but not decoded, within the limits."""
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
    if image.format == "BMP" and width * height > 256 * len(data):
        # Run lengths say at most 255 pixels in 2 bytes; Pillow fills up the rest, a second for 2 megapixels.
        raise BrokenImage(f"decompression bomb: {width}x{height} pixels in {_size(len(data))}")
    if "progressive" in image.info:
        # Each scan goes over the whole picture. Ten are usual; a small file can hold thousands.
        scans = data.count(b"\xff\xda")
        if scans * width * height > 20 * max_pixels:
            raise BrokenImage(f"decompression bomb: {width}x{height} pixels in {scans:,} scans")
    return image


def _open(data: bytes) -> Image.Image:
    known = _recognised(data)
    # libheif leaves out, without a word, those tiles of a picture whose data is missing.
    if known == "HEIF" and (_declared_size(known, data) or 0) > len(data):
        raise BrokenImage(_truncated(known, data))
    if known and _is_unwritten(known, data):
        raise BrokenImage(_truncated(known, data.rstrip(b"\0"), len(data)))
    try:
        return _HeifImage(BytesIO(data)) if known == "HEIF" else Image.open(BytesIO(data), formats=FORMATS)
    except (ImportError, MemoryError):
        raise  # the machine's trouble: no pi-heif, or no memory
    except Exception as error:  # UnidentifiedImageError, and whatever a plugin lets through on a damaged header
        if known is None:
            raise BrokenImage("not an image: the content is none that is known") from error
        if known not in (*FORMATS, "HEIF"):
            raise BrokenImage(f"not an image: the content is {known}") from error
        if (_declared_size(known, data) or 0) > len(data):
            raise BrokenImage(_truncated(known, data)) from error
        found = f"it begins as {_spoken(known)}, but its header cannot be read ({_size(len(data))})"
        raise BrokenImage(f"truncated or damaged: {found}") from error


class _HeifImage(ImageFile.ImageFile):
    """HEIC by the bindings of pi-heif alone: its own plugin reads metadata too, and crashes where that is damaged.

    The decoder turns the picture by the container's word; EXIF has no say (ISO/IEC 23008-12, 6.5.10).
    """

    format = "HEIF"
    _coded = None

    def _open(self) -> None:
        import _pi_heif  # here, because it is rare

        assert self.fp
        # Threads; 8 bits a channel; no BGR; rows as they come; 16 bits where not 8; any decoder; libheif's own limits.
        images = _pi_heif.load_file(self.fp.read(), 4, True, False, False, True, "", False)
        self._coded = next(image for image in images if image is not None and image.primary)
        self._size, self._mode = self._coded.size_mode
        profile = self._coded.color_profile
        if profile and profile["type"] in ("rICC", "prof"):
            self.info["icc_profile"] = profile["data"]

    def load(self) -> Image.core.PixelAccess | None:
        if self._coded:
            data = self._coded.data  # a view of memory that `_coded` owns
            self._size = self._coded.size_mode[0]  # the coded picture may differ from what was announced
            self.load_prepare()
            self.frombytes(data, "raw", (self.mode, self._coded.stride))
            self._coded = None
        return super().load()


def _recognised(data: bytes) -> str | None:
    """The format that the first bytes promise, or what else they are in words; None when they are nothing known."""
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4]), 256)]
        found = {brands[at : at + 4] for at in range(0, len(brands), 4)}
        if found & {b"avif", b"avis"}:
            return "AVIF"
        if found & _HEIF_BRANDS:
            return "HEIF"
    for at, signature, what in _SIGNATURES:
        if data[at : at + len(signature)] == signature:
            return what
    beginning = data[:1000].lower()
    if data[:2] == b"BM" and len(data) > 14 and data[6:10] == bytes(4):
        return "BMP"
    if beginning.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return next((what for tag, what in _MARKUP if tag in beginning), None)
    return None


def _kind(image: Image.Image) -> str:
    return "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with a second picture behind it


def _bytes_needed(kind: str, image: Image.Image, pixels: int) -> int:
    """The peak of preparing an opened and drafted picture that has `pixels` in full size, rounded up from measurements.

    It is reached while decoding, or afterwards, when the picture is made RGB and turned: the larger of the two.
    """
    # Bytes a pixel. Pillow keeps three channels in four bytes.
    stored = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    if image.has_transparency_data:
        beside = 4 if image.mode == "RGBA" else 8
    else:
        beside = {"RGB": 0, "L": 4, "1": 4, "P": 4, "CMYK": 4}.get(image.mode, 9)
    if (kind != "PNG" or "exif" in image.info) and _orientation(image) in _UPRIGHT:  # a PNG would be decoded to look
        beside += 4
    decoder = {"JPEG": 0, "WEBP": 14, "AVIF": 9, "HEIF": 17, "TIFF": 8}.get(kind, 1)
    coefficients = 0.0
    if "progressive" in image.info:  # 16 bits each, and always in full size
        layers = [(across, down) for _, across, down, _ in getattr(image, "layer", [])] or [(1, 1)] * 4
        largest = max(across for across, _ in layers) * max(down for _, down in layers)
        coefficients = 2 * pixels * sum(across * down for across, down in layers) / largest
    decoded = image.width * image.height
    return int(max((stored + decoder) * decoded + coefficients, (stored + beside) * decoded)) + 5_000_000


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
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("RGB")


def _colours(image: Image.Image) -> ImageCmsTransform | None:
    """How the colours of a decoded picture become sRGB; None where they are that already, or nothing says otherwise."""
    if image.mode == "LAB":
        return _to_srgb(b"", "LAB")
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 128 < len(profile) <= MAX_PROFILE_BYTES:
        return None
    mode = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}.get(profile[16:20])  # its colour space (ICC.1, 7.2.6)
    grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
    if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not grey):
        return None
    return _to_srgb(profile, mode)


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCmsTransform | None:
    """The transform from a profile, or from Lab. One that moves no colour by more than 2 levels says sRGB: None."""
    from PIL import ImageChops, ImageCms  # here, because most pictures have no profile

    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    if mode not in ("RGB", "L"):
        return transform
    levels = range(0, 256, 15)
    colours = (
        [(r, g, b) for r in levels for g in levels for b in levels] if mode == "RGB" else [(v,) for v in range(256)]
    )
    probe = Image.frombytes(mode, (len(colours), 1), bytes(value for colour in colours for value in colour))
    moved = ImageChops.difference(probe.convert("RGB"), transform.apply(probe))
    return transform if max(moved.tobytes()) > 2 else None


def _in_srgb(image: Image.Image, transform: ImageCmsTransform | None) -> Image.Image:
    if transform is None:
        return image
    return transform.apply(image.getchannel(0) if transform.input_mode == "L" else image)


def _levels(image: Image.Image, low: float, high: float) -> Image.Image:
    """A picture of mode I or F as 8 bits: `low` becomes 0 and `high` 255."""
    scale = 255 / (high - low)
    offset = 0.5 - low * scale
    return image.point(lambda level: level * scale + offset).convert("L")


def _reason(kind: str, data: bytes, error: Exception) -> str:
    if (
        "truncated" in str(error).lower()
        or isinstance(error, EOFError)
        or (_declared_size(kind, data) or 0) > len(data)
    ):
        return _truncated(kind, data)
    return f"damaged: the {_spoken(kind)} of {_size(len(data))} cannot be decoded ({str(error).strip()})"


def _truncated(kind: str, data: bytes, whole: int | None = None) -> str:
    whole = whole or _declared_size(kind, data) or 0
    least = "at least " if kind in ("PNG", "TIFF") else ""
    of = f" of {least}{_size(whole)}" if whole > len(data) else ""
    return f"truncated after {_size(len(data))}{of}: the {_spoken(kind)} ends in the middle of the picture"


def _is_unwritten(kind: str, data: bytes) -> bool:
    """Whether the end is zeros, as an interrupted copy leaves it, where a decoder might not mind."""
    if kind == "JPEG":  # zeros behind the mark of the end do no harm
        return data.endswith(bytes(16)) and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    if kind == "WEBP":  # so many are no code of a picture
        return any(data.endswith(bytes(1024), 0, end) for end in _webp_pictures(data))
    if kind == "HEIF":  # no NAL unit ends with a zero (H.265, 7.4.2)
        try:
            return any(data.endswith(bytes(32), 0, end) for end in _heif_pictures(data))
        except (struct.error, IndexError):  # the decoder will find words for it
            return False
    return False


def _webp_pictures(data: bytes) -> Iterator[int]:
    """Where the picture's code ends, the first one's: metadata comes behind it, which may well end with zeros."""
    at = 12
    while at + 8 <= len(data):
        what, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if what in (b"VP8 ", b"VP8L", b"ANMF"):
            yield at + 8 + length
        if what in (b"VP8 ", b"VP8L", b"ANMF", bytes(4)):
            return
        at += 8 + length + length % 2


def _heif_pictures(data: bytes) -> Iterator[int]:
    """Where pieces of coded pictures end (ISO/IEC 14496-12, 8.11.3 and 8.11.6), wherever metadata lies."""
    meta = next((data[begin:end] for what, begin, end in _boxes(data, 0) if what == b"meta"), b"")
    boxes = {what: meta[begin:end] for what, begin, end in _boxes(meta, 4)}
    coded = set()
    entries = boxes.get(b"iinf", b"")
    for _, begin, _ in _boxes(entries, 8 if entries[:1] > b"\0" else 6):
        wide = entries[begin] > 2  # version 3 has longer ids
        item, _, what = struct.unpack_from(">IH4s" if wide else ">HH4s", entries, begin + 4)
        coded |= {item} if what == b"hvc1" else set()
    places, at = boxes.get(b"iloc", bytes(8)), 6

    def number(size: int) -> int:
        nonlocal at
        at += size
        if at > len(places):
            raise IndexError
        return int.from_bytes(places[at - size : at])

    version, sizes = places[0], (places[4] >> 4, places[4] & 15, places[5] >> 4, places[5] & 15 if places[0] else 0)
    if not sizes[1]:
        return  # pieces without a length: a few bytes could tell of billions
    for _ in range(number(4 if version > 1 else 2)):
        item = number(4 if version > 1 else 2)
        in_file = version == 0 or number(2) & 15 == 0
        number(2)  # of another file, which nobody does
        base = number(sizes[2])
        for _ in range(number(2)):
            number(sizes[3])
            end = base + number(sizes[0]) + number(sizes[1])
            if item in coded and in_file:
                yield end


def _boxes(data: bytes, at: int) -> Iterator[tuple[bytes, int, int]]:
    """What, and from where to where, the boxes from `at` hold (ISO/IEC 14496-12, 4.2); the last may be cut off."""
    while at + 8 <= len(data):
        length, what, head = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], 8
        if length == 1:  # the size follows
            length, head = int.from_bytes(data[at + 8 : at + 16]), 16
        elif length == 0:  # it goes on to the end, wherever that is
            length = len(data) - at
        if length < head:
            return
        yield what, at + head, at + length
        at += length


def _declared_size(kind: str, data: bytes) -> int | None:
    """How many bytes the file has by its own account; of a PNG and a TIFF the least that it must have."""
    if kind == "WEBP":
        return 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return int.from_bytes(data[2:6], "little")
    if kind == "TIFF":  # where its directory lies, often at the end
        return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big")
    if kind in ("AVIF", "HEIF"):
        *_, (what, _, end) = [(b"", 0, 0), *_boxes(data, 0)]
        return end if what == b"mdat" else None  # the last box holds the pictures
    if kind != "PNG":
        return None
    at = 8
    while at + 8 <= len(data):
        at += 12 + int.from_bytes(data[at : at + 4])
    return at


def _spoken(format: str) -> str:
    return {"WEBP": "WebP", "HEIF": "HEIC"}.get(format, format)


def _size(count: int) -> str:
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1000:,.0f} kB"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.4g} MB" if count >= 1e5 else f"{count:,} bytes"
