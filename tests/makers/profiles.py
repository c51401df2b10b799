"""ICC profiles (ICC.1:2022), and pictures stored in their colours: computed here, without the library under test."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

# Red, green and blue as XYZ under D50, and the exponent of the curve; None for the curve of sRGB.
SPACES: dict[str, tuple[list[list[float]], float | None]] = {
    "sRGB": ([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]], None),
    "Display P3": ([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]], None),
    "Adobe RGB": ([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]], 2.19922),
    "ProPhoto": ([[0.79767, 0.28804, 0.0], [0.13519, 0.71188, 0.0], [0.03134, 0.00009, 0.82491]], 1.8),
}
CYAN = (0, 158, 224)  # what the cyan ink of `cmyk` looks like; the others are the complements of red, green and blue
_D50 = (0.9642, 1.0, 0.8249)


def rgb(name: str) -> bytes:
    """The profile of one of SPACES."""
    primaries, gamma = SPACES[name]
    tags = {b"wtpt": _xyz(_D50)} | {
        key: _xyz(tuple(primary)) for key, primary in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    return _profile(b"mntr", b"RGB ", b"XYZ ", name, tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma)))


def grey(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", f"Grey {gamma}", {b"wtpt": _xyz(_D50), b"kTRC": _curve(gamma)})


def cmyk() -> bytes:
    """A press whose inks are ideal, but for cyan."""
    corners = []
    for inks in np.ndindex(2, 2, 2, 2):
        seen = np.array([255, 255, 255]) * (1 - inks[3])
        for ink, colour in zip(inks, (CYAN, (255, 0, 255), (255, 255, 0)), strict=False):
            seen = seen * np.array(colour) / 255 if ink else seen
        x, y, z = _linear(seen / 255) @ np.array(SPACES["sRGB"][0]) / _D50
        fx, fy, fz = (v ** (1 / 3) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in (x, y, z))
        lab = (116 * fy - 16) * 2.55, 500 * (fx - fy) + 128, 200 * (fy - fz) + 128
        corners += [round(min(max(v, 0), 255)) for v in lab]
    straight = bytes(range(256))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + straight * 4 + bytes(corners) + straight * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", "Press", {b"wtpt": _xyz(_D50), b"A2B0": table})


def stored(image: Image.Image, name: str) -> Image.Image:
    """The sRGB picture in the numbers of another of SPACES."""
    primaries, gamma = SPACES[name]
    linear = _linear(np.asarray(image, float) / 255) @ np.array(SPACES["sRGB"][0]) @ np.linalg.inv(np.array(primaries))
    linear = linear.clip(0, 1)
    encoded = linear ** (1 / gamma) if gamma else _encoded(linear)
    return Image.fromarray((encoded * 255).round().astype(np.uint8))


def stored_grey(image: Image.Image, gamma: float) -> Image.Image:
    """A picture of mode L in the numbers of `grey`."""
    return Image.fromarray((_linear(np.asarray(image, float) / 255) ** (1 / gamma) * 255).round().astype(np.uint8))


def _linear(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _encoded(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * value ** (1 / 2.4) - 0.055)


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def _curve(gamma: float | None) -> bytes:
    if gamma:
        return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para" + bytes(4) + struct.pack(">HH5i", 3, 0, *(round(v * 65536) for v in numbers))


def _profile(kind: bytes, space: bytes, connection: bytes, name: str, tags: dict[bytes, bytes]) -> bytes:
    text = name.encode("utf-16-be")
    tags = {b"desc": b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text} | tags
    offset = 132 + 12 * len(tags)
    table, content = struct.pack(">I", len(tags)), b""
    for key, data in tags.items():
        table += struct.pack(">4sII", key, offset + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    illuminant = struct.pack(">3i", *(round(v * 65536) for v in _D50))
    header = struct.pack(">I4xI4s4s4s12x4s28x", offset + len(content), 0x04200000, kind, space, connection, b"acsp")
    return header + illuminant + bytes(48) + table + content
