"""Picture files for tests: whole ones in every format and mode, and broken ones with the reason they carry."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int = 64, height: int = 48, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth random colours: compressible, and different everywhere."""
    cells = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def oriented(image: Image.Image, orientation: int, format: str = "JPEG", **options: Any) -> bytes:
    """The file's EXIF says how a viewer has to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, format, exif=exif, **options)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def whole() -> dict[str, bytes]:
    """Files that must be classified, by what is special about them. All show the same picture of 64x48."""
    image = picture()
    return {
        "jpeg": encode(image, "JPEG", quality=90),
        "jpeg progressive": encode(image, "JPEG", progressive=True),
        "jpeg grey": encode(image.convert("L"), "JPEG"),
        "jpeg cmyk": encode(image.convert("CMYK"), "JPEG", quality=95),
        "jpeg without subsampling": encode(image, "JPEG", subsampling=0),
        "jpeg of several pictures": encode(image, "MPO", save_all=True, append_images=[image.rotate(180)]),
        "png": encode(image, "PNG"),
        "png palette": encode(image.quantize(64), "PNG"),
        "png alpha": encode(image.convert("RGBA"), "PNG"),
        "png grey with alpha": encode(image.convert("LA"), "PNG"),
        "png black and white": encode(image.convert("1"), "PNG"),
        "png 16 bit": encode(Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), "PNG"),
        "webp": encode(image, "WEBP", quality=90),
        "webp lossless": encode(image, "WEBP", lossless=True),
        "avif": encode(image, "AVIF", quality=90),
        "gif": encode(image, "GIF"),
        "gif animated": encode(image, "GIF", save_all=True, append_images=[image.rotate(180)]),
        "tiff": encode(image, "TIFF"),
        "tiff compressed": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff of two pages": encode(image, "TIFF", save_all=True, append_images=[image.rotate(180)]),
        "tiff 16 bit": encode(Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), "TIFF"),
        "tiff float": encode(image.convert("F"), "TIFF"),
        "bmp": encode(image, "BMP"),
    }


def broken() -> dict[str, tuple[bytes, str]]:
    """Files that can never be classified, with a part of the reason."""
    jpeg, png = encode(picture(200, 150), "JPEG"), encode(picture(200, 150), "PNG")
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    return {
        "empty": (b"", "empty object"),
        "text": (b"Dear diary, this is no picture.\n" * 20, "not an image"),
        "html": (b"<!doctype html><title>404 Not Found</title>", "not an image"),
        "zip": (b"PK\x03\x04" + bytes(200), "not an image"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n", "not an image"),
        "one byte": (b"\xff", "not an image"),
        "zeros": (bytes(1000), "not an image"),
        "jpeg half": (jpeg[: len(jpeg) // 2], f"truncated: the JPEG ends after {len(jpeg) // 2:,} bytes"),
        "jpeg header": (jpeg[:20], "truncated or damaged: it begins as JPEG"),
        "jpeg filled up with zeros": (jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "truncated"),
        "png half": (png[: len(png) // 2], "truncated: the PNG"),
        "png with a wrong byte": (bytes(damaged), "damaged: the PNG"),
        "bomb": (png_header(30_000, 30_000), "decompression bomb: 30000x30000 pixels; the limit is 120,000,000"),
        "1x1": (encode(Image.new("RGB", (1, 1))), "1x1 pixels"),
        "line": (encode(Image.new("RGB", (500, 2))), "500x2 pixels"),
    }
