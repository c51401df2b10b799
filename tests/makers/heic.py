"""HEIC files without an encoder: HEVC may carry its samples uncompressed (PCM), and a decoder gives them back.

Field names and their order are those of ITU-T H.265 and ISO/IEC 23008-12.
"""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

BLOCK = 32  # side of a coding tree block, the largest that may be PCM
# Each block is a slice of its own, so that the arithmetic coder says the same each time: not divided, PCM; and behind
# the samples: the slice ends.
_PCM, _END = b"\x86\x80", b"\xfe\x80"
_PROFILE = "00" + "0" + f"{4:05b}" + f"{1 << 27:032b}" + "1001" + "0" * 44 + f"{186:08b}"  # range extensions, level 6.2


def heic(
    image: Image.Image, *, rotate: int = 0, grid: bool = False, icc: bytes = b"", exif: bytes = b"", depth: int = 8
) -> bytes:
    """`image` as HEIC, 4:4:4; `rotate`: quarters that a viewer has to turn it counterclockwise; `grid`: of two tiles.

    `depth`: bits a sample, 8 or 10. `exif`: as Pillow gives it, with or without its `Exif` mark.
    """
    colour = b"nclx" + struct.pack(">HHHB", 1, 13, 6, 0x80)  # sRGB as full-range BT.601
    shared = [_box(b"colr", b"prof" + icc)] if icc else []
    shared += [_box(b"colr", colour)]
    if rotate:
        shared.append(_box(b"irot", bytes([rotate])))
    if not grid:
        return _file([(b"hvc1", _picture(image, depth), [*_described(image, depth), *shared])], exif)
    half = image.width // 2
    tiles = [image.crop((x, 0, x + half, image.height)) for x in (0, half)]
    items = [(b"hvc1", _picture(tile, depth), [*_described(tile, depth), _box(b"colr", colour)]) for tile in tiles]
    layout = struct.pack(">BBBBHH", 0, 0, 0, 1, 2 * half, image.height)
    return _file([(b"grid", layout, [_extent(2 * half, image.height), *shared]), *items], exif)


def _described(image: Image.Image, depth: int) -> list[bytes]:
    parameters = _parameter_sets(*image.size, depth)
    profile = int(_PROFILE, 2).to_bytes(12, "big")
    record = (
        b"\x01" + profile + struct.pack(">HBBBBHBB", 0xF000, 0xFC, 0xFF, 0xF8 | depth - 8, 0xF8 | depth - 8, 0, 15, 3)
    )
    for unit in parameters:
        record += struct.pack(">BHH", unit[0] >> 1, 1, len(unit)) + unit
    return [_box(b"hvcC", record), _extent(*image.size)]


def _extent(width: int, height: int) -> bytes:
    return _box(b"ispe", struct.pack(">III", 0, width, height))


def _picture(image: Image.Image, depth: int) -> bytes:
    """The coded picture: length-prefixed slices, a block each."""
    columns, rows = -(-image.width // BLOCK), -(-image.height // BLOCK)
    pixels = np.asarray(image.convert("YCbCr"), np.uint16) << depth - 8
    padding = ((0, rows * BLOCK - image.height), (0, columns * BLOCK - image.width), (0, 0))
    pixels = np.pad(pixels, padding, mode="edge")
    coded = b""
    for number in range(rows * columns):
        y, x = (side * BLOCK for side in divmod(number, columns))
        block = pixels[y : y + BLOCK, x : x + BLOCK].transpose(2, 0, 1)
        bits = np.unpackbits(block.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 16 - depth :]
        address = f"{number:0{(rows * columns - 1).bit_length()}b}" if number and rows * columns > 1 else ""
        # first_slice_segment_in_pic_flag, no_output_of_prior_pics_flag, parameter set, address, slice_type I, QP
        header = _bytes(("0" if number else "1") + "0" + _ue(0) + address + _ue(2) + _ue(0))
        unit = _unit(19, header + _PCM + np.packbits(bits).tobytes() + _END)
        coded += struct.pack(">I", len(unit)) + unit
    return coded


def _parameter_sets(width: int, height: int, depth: int) -> list[bytes]:
    """Video, sequence and picture parameter sets."""
    full = [-(-side // BLOCK) * BLOCK for side in (width, height)]
    window = _ue(0) + _ue(full[0] - width) + _ue(0) + _ue(full[1] - height)
    video = "0000" + "11" + "000000" + "000" + "1" + "1" * 16 + _PROFILE + "1" + _ue(0) * 3 + "000000" + _ue(0) + "00"
    sequence = (
        "0000" + "000" + "1" + _PROFILE + _ue(0) + _ue(3) + "0" + _ue(full[0]) + _ue(full[1]) + "1" + window
        + _ue(depth - 8) * 2 + _ue(0) + "1" + _ue(0) * 3
        + _ue(2) + _ue(0) + _ue(0) + _ue(3) + _ue(0) * 2  # sizes: coding blocks 32, transforms 4 to 32
        + "000" + "1" + f"{depth - 1:04b}" * 2 + _ue(2) + _ue(0) + "1"  # PCM, in blocks of 32, not filtered
        + _ue(0) + "000" + "0" + "0"
    )  # fmt: skip
    # All tools off; the deblocking filter is off too (the three ones and the 0 before the last).
    picture = _ue(0) * 2 + "0000000" + _ue(0) * 3 + "000" + _ue(0) * 2 + "0000000" + "101" + "00" + _ue(0) + "00"
    return [_unit(kind, _bytes(bits)) for kind, bits in ((32, video), (33, sequence), (34, picture))]


def _file(items: list[tuple[bytes, bytes, list[bytes]]], exif: bytes) -> bytes:
    """Items (type, data, properties), the first being the primary one; the others, if any, are its tiles."""
    if exif:
        items = [*items, (b"Exif", struct.pack(">I", 6) + b"Exif\0\0" + exif.removeprefix(b"Exif\0\0"), [])]
    shared = list(dict.fromkeys(p for _, _, properties in items for p in properties))
    entries = [struct.pack(">HH4s", number, 0, kind) + b"\0" for number, (kind, _, _) in enumerate(items, 1)]
    about = b"".join(_box(b"infe", b"\x02\0\0\0" + entry) for entry in entries)
    associations = struct.pack(">II", 0, sum(bool(properties) for _, _, properties in items))
    for number, (_, _, properties) in enumerate(items, 1):
        if properties:
            associations += struct.pack(">HB", number, len(properties))
            associations += bytes(0x80 | shared.index(p) + 1 for p in properties)
    references = b""
    tiles = [number for number, (kind, _, _) in enumerate(items, 1) if kind == b"hvc1" and number > 1]
    if tiles:
        references += _box(b"dimg", struct.pack(f">HH{len(tiles)}H", 1, len(tiles), *tiles))
    if exif:
        references += _box(b"cdsc", struct.pack(">HHH", len(items), 1, 1))
    start = _box(b"ftyp", b"heic" + bytes(4) + b"mif1heic")

    def meta(offset: int) -> bytes:
        places = struct.pack(">IBBH", 0, 0x44, 0, len(items))
        for number, (_, data, _) in enumerate(items, 1):
            places += struct.pack(">HHHII", number, 0, 1, offset, len(data))
            offset += len(data)
        boxes = [
            _box(b"hdlr", bytes(8) + b"pict" + bytes(13)),
            _box(b"pitm", struct.pack(">IH", 0, 1)),
            _box(b"iloc", places),
            _box(b"iinf", struct.pack(">IH", 0, len(items)) + about),
            _box(b"iref", bytes(4) + references) if references else b"",
            _box(b"iprp", _box(b"ipco", b"".join(shared)) + _box(b"ipma", associations)),
        ]
        return _box(b"meta", bytes(4) + b"".join(boxes))

    offset = len(start) + len(meta(0)) + 8
    return start + meta(offset) + _box(b"mdat", b"".join(data for _, data, _ in items))


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _unit(kind: int, payload: bytes) -> bytes:
    """A NAL unit. Three bytes that look like the start of another are parted by a 3."""
    data, zeros = bytearray(), 0
    for byte in payload:
        if zeros >= 2 and byte <= 3:
            data.append(3)
            zeros = 0
        data.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return struct.pack(">H", kind << 9 | 1) + bytes(data)


def _bytes(bits: str) -> bytes:
    """The bits, a one, and zeros up to a whole byte."""
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def _ue(value: int) -> str:
    """Exponential-Golomb code of an unsigned number; 0 is the same signed."""
    bits = f"{value + 1:b}"
    return "0" * (len(bits) - 1) + bits
