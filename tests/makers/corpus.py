"""Picture files of every kind, good and broken, made from a seed: for unit tests and for benchmarks.

    for name, data, expected in good(seed): …    # expected: Whole, what the file shows
    for name, data, expected in broken(seed): …  # expected: str, a part of the reason it is refused with
    for name, data, expected in exhausting(): …  # expected: str, a part of the reason for which it fails

Names are distinct. The good files of one seed all show the same picture.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops

from tests.makers import profiles
from tests.makers.heic import heic
from tests.makers.images import encode, oriented, picture, png_chunk, png_header


class Whole(NamedTuple):
    """What a good file shows: the upright picture in sRGB, and by how many levels a pixel may differ on average."""

    format: str
    image: Image.Image
    tolerance: float
    differs: str | None = None  # the note on its name


def good(seed: int = 0) -> Iterator[tuple[str, bytes, Whole]]:
    rng = np.random.default_rng(seed)
    image = _picture(rng, 20, seed)
    grey, ink = image.convert("L"), image.convert("CMYK")
    other = image.rotate(180)

    def show(name: str, data: bytes, format: str, tolerance: float = 0.0, shows: Image.Image = image):
        return name, data, Whole(format, shows.convert("RGB"), tolerance)

    def jpeg(name: str, of: Image.Image = image, tolerance: float = 6, shows: Image.Image = image, **options):
        return show(f"{name}.jpg", encode(of, "JPEG", quality=92, **options), "JPEG", tolerance, shows)

    plain = encode(image, "JPEG", quality=92)
    yield jpeg("plain")
    yield jpeg("progressive", progressive=True)
    yield jpeg("grey", grey, 3, grey)
    yield jpeg("restart markers", restart_marker_blocks=2)
    yield jpeg("comment", comment="Grüße")
    for subsampling in ("4:4:4", "4:2:2", "4:1:1"):
        yield jpeg(f"subsampling {subsampling.replace(':', '')}", subsampling=subsampling, tolerance=8)
    cmyk = encode(ink, "JPEG", quality=95)
    yield show("cmyk.jpg", cmyk, "JPEG", 6)
    adobe = cmyk.index(b"\xff\xee")
    yield show("cmyk without Adobe's mark.jpg", cmyk[:adobe] + cmyk[adobe + 16 :], "JPEG", 6)
    yield show("ycck.jpg", _ycck(ink), "JPEG", 8)
    yield show(
        "two pictures.jpg", encode(image, "MPO", quality=92, save_all=True, append_images=[other.copy()]), "JPEG", 6
    )
    yield show("zip behind it.jpg", plain + b"PK\x03\x04" + bytes(60), "JPEG", 6)
    yield show("zeros behind it.jpg", plain + bytes(500), "JPEG", 6)
    yield show(
        "metadata in ruins.jpg", encode(image, "JPEG", quality=92, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff?"), "JPEG", 6
    )
    orientation = int(rng.integers(2, 9))
    turned = oriented(_untransposed(image, orientation), orientation, quality=92, subsampling=0)
    yield show(f"orientation {orientation}.jpg", turned, "JPEG", 6)

    yield show("plain.png", encode(image), "PNG")
    yield show("palette.png", encode(image.quantize(64)), "PNG", 20)
    yield show("grey.png", encode(grey), "PNG", 0, grey)
    yield show("grey with alpha.png", encode(grey.convert("LA")), "PNG", 0, grey)
    yield show("black and white.png", encode(grey.convert("1")), "PNG", 0, grey.convert("1"))
    yield show("animated.png", encode(image, save_all=True, append_images=[other]), "PNG")
    yield show("orientation.png", oriented(_untransposed(image, 6), 6, "PNG"), "PNG")
    cut = image.copy()
    cut.putalpha(Image.linear_gradient("L").resize(image.size))
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), cut)
    yield show("alpha.png", encode(cut), "PNG", 1, white)
    colours = np.asarray(image)
    wide = colours.astype(np.uint16) * 257
    yield show("interlaced.png", _png(colours, 8, 2, interlaced=True), "PNG")
    yield show("16 bit.png", _png(wide, 16, 2), "PNG", 1)
    yield show("16 bit grey.png", _png(np.asarray(grey, np.uint16)[..., None] * 257, 16, 0), "PNG", 1, grey)
    yield show("one colour is transparent.png", encode(image, transparency=(1, 2, 3)), "PNG", 1)
    palette = image.quantize(64)
    palette.info["transparency"] = bytes([255] * 64)
    yield show("palette with alpha.png", encode(palette), "PNG", 20)

    yield show("plain.webp", encode(image, "WEBP", quality=95), "WEBP", 8)
    yield show("lossless.webp", encode(image, "WEBP", lossless=True), "WEBP")
    yield show("alpha.webp", encode(cut, "WEBP", lossless=True, exact=True), "WEBP", 1, white)
    frames = {"save_all": True, "append_images": [other], "lossless": True}
    yield show("animated.webp", encode(image, "WEBP", **frames), "WEBP", 1)
    yield show("plain.avif", encode(image, "AVIF", quality=95, speed=10), "AVIF", 8)
    yield show("grey.avif", encode(grey, "AVIF", quality=95, speed=10), "AVIF", 4, grey)
    yield show("444.avif", encode(image, "AVIF", quality=95, speed=10, subsampling="4:4:4"), "AVIF", 6)
    yield show("orientation.avif", oriented(_untransposed(image, 8), 8, "AVIF", quality=95, speed=10), "AVIF", 8)
    yield show("plain.gif", encode(image, "GIF"), "GIF", 20)
    yield show("animated.gif", encode(image, "GIF", save_all=True, append_images=[other]), "GIF", 20)
    yield show("script behind it.gif", encode(image, "GIF") + b"*/=1;alert(1)//", "GIF", 20)

    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"):
        yield show(f"{compression}.tif", encode(image, "TIFF", compression=compression), "TIFF")
    yield show("jpeg inside.tif", encode(image, "TIFF", compression="jpeg", quality=95), "TIFF", 8)
    fax = grey.convert("1")
    yield show("fax.tif", encode(fax, "TIFF", compression="group4"), "TIFF", 0, fax)
    yield show("two pages.tif", encode(image, "TIFF", save_all=True, append_images=[other]), "TIFF")
    yield show("cmyk.tif", encode(ink, "TIFF"), "TIFF", 1)
    yield show("float.tif", encode(grey.convert("F"), "TIFF"), "TIFF", 1, grey)
    yield show("16 bit.tif", encode(Image.fromarray(np.asarray(grey, np.uint16) * 257), "TIFF"), "TIFF", 1, grey)
    yield show("planar.tif", _tiff(colours, planar=True), "TIFF")
    yield show("big-endian.tif", _tiff(colours, order=">"), "TIFF")
    yield show("cielab.tif", encode(_lab(image), "TIFF"), "TIFF", 3)
    yield show("orientation.tif", oriented(_untransposed(image, 5), 5, "TIFF"), "TIFF")
    yield show("plain.bmp", encode(image, "BMP"), "BMP")
    yield show("palette.bmp", encode(image.quantize(64), "BMP"), "BMP", 20)
    yield show("black and white.bmp", encode(fax, "BMP"), "BMP", 0, fax)
    yield show("16 bit.bmp", _bmp_565(colours), "BMP", 5)
    yield show("run lengths.bmp", _bmp_rle(grey), "BMP", 0, grey)

    yield show("plain.heic", heic(image), "HEIF", 1)
    yield show("tiles.heic", heic(image, grid=True), "HEIF", 1)
    yield show("10 bit.heic", heic(image, depth=10), "HEIF", 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = heic(image.transpose(Image.Transpose.ROTATE_90), rotate=3, exif=exif.tobytes())
    yield show("turned, and said twice.heic", turned, "HEIF", 1)
    p3 = profiles.rgb("Display P3")
    unnamed = turned.replace(b"Exif", b"\x94xif", 1)  # metadata of a kind that has no name
    yield show("odd metadata.heic", unnamed, "HEIF", 1)
    yield show("display p3.heic", heic(profiles.stored(image, "Display P3"), icc=p3), "HEIF", 2)

    for name in profiles.SPACES:
        inside = profiles.stored(image, name)
        yield show(f"profile {name}.png", encode(inside, icc_profile=profiles.rgb(name)), "PNG", 2)
    inside = profiles.stored(image, "Adobe RGB")
    adobe_rgb = profiles.rgb("Adobe RGB")
    yield jpeg("profile Adobe RGB", inside, subsampling=0, icc_profile=adobe_rgb, tolerance=8)
    yield show("profile.webp", encode(inside, "WEBP", lossless=True, icc_profile=adobe_rgb), "WEBP", 2)
    yield show("profile.avif", encode(inside, "AVIF", quality=95, speed=10, icc_profile=adobe_rgb), "AVIF", 10)
    yield show("profile.tif", encode(inside, "TIFF", icc_profile=adobe_rgb), "TIFF", 2)
    bright = profiles.stored_grey(grey, 1.8)
    yield show("profile grey.png", encode(bright, icc_profile=profiles.grey(1.8)), "PNG", 1, grey)
    yield show("profile in ruins.png", encode(image, icc_profile=adobe_rgb[:200] + bytes(300)), "PNG")
    yield show("profile of another mode.png", encode(image, icc_profile=profiles.cmyk()), "PNG")
    press = Image.merge("CMYK", (Image.new("L", image.size, 255), *[Image.new("L", image.size)] * 3))
    cyan = Image.new("RGB", image.size, profiles.CYAN)
    yield jpeg("profile of a press", press, 4, cyan, icc_profile=profiles.cmyk())

    yield "a jpeg.png", plain, Whole("JPEG", image, 6, "named .png, is a JPEG")
    yield "a png.JPG", encode(image), Whole("PNG", image, 0, "named .jpg, is a PNG")
    yield "a heic.jpeg", heic(image), Whole("HEIF", image, 1, "named .jpeg, is a HEIC")
    yield "without extension", plain, Whole("JPEG", image, 6)


def broken(seed: int = 0) -> Iterator[tuple[str, bytes, str]]:
    rng = np.random.default_rng(seed)
    image = _picture(rng, 40, seed)
    noise = Image.fromarray(rng.integers(0, 256, (image.height, image.width, 3), np.uint8))
    whole = {
        "jpeg": encode(noise, "JPEG"),
        "progressive jpeg": encode(noise, "JPEG", progressive=True),
        "png": encode(noise),
        "webp": encode(noise, "WEBP"),
        "lossless webp": encode(noise, "WEBP", lossless=True),
        "avif": encode(noise, "AVIF", speed=10),
        "gif": encode(noise, "GIF"),
        "tiff": encode(noise, "TIFF"),
        "lzw tiff": encode(noise, "TIFF", compression="tiff_lzw"),
        "bmp": encode(noise, "BMP"),
        "heic": heic(noise),
        "tiled heic": heic(noise, grid=True),
    }
    for name, data in whole.items():
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            yield f"{name} cut at {share:.0%}.{name.split()[-1]}", data[: int(len(data) * share)], "truncated"
        yield f"{name} of 30 bytes", data[:30], "truncated"
    for name in ("jpeg", "progressive jpeg", "webp", "lossless webp", "gif", "heic", "tiled heic"):
        written = whole[name][: len(whole[name]) // 2]
        yield f"{name}, half unwritten.{name.split()[-1]}", written.ljust(len(whole[name]), b"\0"), "truncated"
    for at in (0.4, 0.8):
        damaged = bytearray(whole["png"])
        damaged[int(at * len(damaged))] ^= 0xFF
        yield f"wrong byte at {at:.0%}.png", bytes(damaged), "damaged"

    yield "empty.jpg", b"", "empty object"
    yield "one byte", b"\xff", "not an image"
    yield "zeros.jpg", bytes(4096), "not an image"
    yield "random.jpg", b"\0" + rng.bytes(4095), "not an image"
    yield "notes.txt", b"Dear diary, this is no picture.\n" * 20, "not an image"
    yield "notes in UTF-16.txt", "Dear diary".encode("utf-16"), "not an image"
    yield "answer.json", b'{"error": "AccessDenied"}', "not an image"
    yield "404.jpg", b"<!doctype html><title>404 Not Found</title>", "a web page"
    yield "drawing.svg", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"
    yield "report.pdf", b"%PDF-1.7\n" + whole["jpeg"], "a PDF document"
    yield "figure.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n", "a PostScript document"
    yield "album.zip", b"PK\x03\x04" + bytes(26) + whole["jpeg"], "a ZIP archive"
    yield "album.tar.gz", b"\x1f\x8b\x08" + bytes(100), "a gzip archive"
    yield "layers.psd", b"8BPS\0\x01" + bytes(100), "a Photoshop document"
    yield "film.mp4", struct.pack(">I", 24) + b"ftypisom" + bytes(4) + b"isommp42" + bytes(100), "a film"
    yield "new.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "a JPEG XL"
    yield "old.jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), "a JPEG 2000"
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        dot = Image.new("RGB", (1, 1))
        yield f"dot.{format.lower()}", encode(dot, format), "1x1 pixels; the shorter side must have at least 8"
    yield "line.png", encode(Image.new("RGB", (500, 2))), "500x2 pixels"

    side = int(rng.integers(15_000, 16_000))
    huge = f"decompression bomb: {side}x{side} pixels"
    size = {order: struct.pack(f"{order}HH", side, side) for order in "<>"}
    yield "bomb.png", png_header(side, side), huge
    frame = whole["jpeg"].index(b"\xff\xc0") + 5
    yield "bomb.jpg", whole["jpeg"][:frame] + size[">"] + whole["jpeg"][frame + 4 :], huge
    yield "bomb.gif", b"GIF89a" + size["<"] + whole["gif"][10:], huge
    long = struct.pack("<ii", side, side)
    yield "bomb.bmp", whole["bmp"][:18] + long + whole["bmp"][26:], huge
    yield "bomb.tif", _tiff(np.asarray(noise), declared=(side, side)), huge
    old = struct.pack(">II", *noise.size)
    yield "bomb.heic", whole["heic"].replace(old, struct.pack(">II", side, side), 1), huge
    vp8l = encode(noise, "WEBP", lossless=True)
    declared = struct.pack("<I", (side - 1) | (side - 1) << 14)
    yield "bomb.webp", vp8l[:21] + declared + vp8l[25:], huge
    empty = _bmp(3000, 3000, 8, 1, bytes(1024), b"\0\1")
    yield "slow.bmp", empty, "decompression bomb: 3000x3000 pixels in 1,080 bytes"
    scans = encode(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    yield "slow.jpg", scans[:-2] + scans[last:-2] * 700 + scans[-2:], "decompression bomb: 2000x2000 pixels in 70"
    yield "without size.png", png_header(0, 0), "header"
    twelve = whole["jpeg"][: frame - 1] + b"\x0c" + whole["jpeg"][frame:]
    yield "12 bit.jpg", twelve, "its header cannot be read"


def exhausting() -> Iterator[tuple[str, bytes, str]]:
    """Within every limit, and yet no function of the template's size has the memory to decode them: they fail."""
    side = 10_900  # 119 megapixels, of which libwebp and Pillow keep four copies at once
    huge = encode(Image.new("RGB", (side, side)), "WEBP", lossless=True, quality=0, method=0)
    yield "huge.webp", huge, "its decoding needed more than"


def _picture(rng: np.random.Generator, least: int, seed: int) -> Image.Image:
    width, height = rng.integers(least, 2 * least + 20, 2) * 2  # even, for the two tiles of HEIC
    return picture(int(width), int(height), seed)


def _untransposed(image: Image.Image, orientation: int) -> Image.Image:
    """How the picture is stored in a file whose EXIF gives this orientation."""
    turn = Image.Transpose
    undo = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
            6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}  # fmt: skip
    return image.transpose(undo[orientation])


def _ycck(ink: Image.Image) -> bytes:
    """Colours as luma and chroma beside black, as Photoshop writes them: Adobe's mark says so with a 2."""
    *colours, black = ink.split()
    parted = Image.merge("RGB", colours).convert("YCbCr").split()
    data = bytearray(encode(Image.merge("CMYK", [*map(ImageChops.invert, parted), black]), "JPEG", quality=95))
    data[data.index(b"\xff\xee") + 15] = 2
    return bytes(data)


def _lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab = ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    assert converted
    del converted.info["icc_profile"]  # it carries the time
    return converted


def _png(pixels: np.ndarray, depth: int, colour: int, interlaced: bool = False) -> bytes:
    """Colour types: 0 grey, 2 RGB."""
    # The passes of Adam7: where each begins, and its steps.
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes] if interlaced else [pixels]
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour, 0, 0, interlaced)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _tiff(pixels: np.ndarray, order: str = "<", planar: bool = False, declared: tuple[int, int] | None = None) -> bytes:
    """Uncompressed RGB in one strip, or in one for each channel."""
    height, width = pixels.shape[:2]
    strips = [plane.tobytes() for plane in pixels.transpose(2, 0, 1)] if planar else [pixels.tobytes()]
    count, at = len(strips), 8 + 2 + 10 * 12 + 4
    extra = struct.pack(f"{order}3H", 8, 8, 8)
    first = at + 6 + 8 * count
    offsets = [first + sum(len(strip) for strip in strips[:number]) for number in range(count)]
    extra += struct.pack(f"{order}{count}I", *offsets) + struct.pack(f"{order}{count}I", *map(len, strips))
    places, lengths = (at + 6, at + 6 + 4 * count) if planar else (first, len(strips[0]))
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2),
               (273, 4, count, places), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, count, lengths),
               (284, 3, 1, 2 if planar else 1)]  # fmt: skip
    if declared:
        entries[:2] = [(256, 4, 1, declared[0]), (257, 4, 1, declared[1])]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, length, value in entries:
        short = kind == 3 and length == 1
        directory += struct.pack(f"{order}HHI" + ("Hxx" if short else "I"), tag, kind, length, value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8) + directory + bytes(4) + extra + b"".join(strips)


def _bmp_565(pixels: np.ndarray) -> bytes:
    """16 bits a pixel: 5, 6 and 5 bits of red, green and blue."""
    height, width = pixels.shape[:2]
    red, green, blue = (pixels[..., channel].astype(np.uint16) for channel in range(3))
    rows = (
        np.pad((red >> 3) << 11 | (green >> 2) << 5 | blue >> 3, ((0, 0), (0, width % 2)))[::-1].astype("<u2").tobytes()
    )
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    return _bmp(width, height, 16, 3, masks, rows)


def _bmp_rle(grey: Image.Image) -> bytes:
    """Run lengths of 8 bits, with the greys as the palette."""
    palette = bytes(value for level in range(256) for value in (level, level, level, 0))
    data = b""
    for row in np.asarray(grey)[::-1]:
        ends = [0, *(np.flatnonzero(np.diff(row.astype(int))) + 1), len(row)]
        data += b"".join(bytes((int(b - a), int(row[a]))) for a, b in zip(ends, ends[1:], strict=False)) + b"\0\0"
    return _bmp(*grey.size, 8, 1, palette, data + b"\0\1")


def _bmp(width: int, height: int, depth: int, compression: int, table: bytes, data: bytes) -> bytes:
    start = 14 + 40 + len(table)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, depth, compression, len(data), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + table + data
