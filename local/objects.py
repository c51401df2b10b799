"""The files of S3's objects: data and, beside it, metadata. A write that is interrupted leaves both old or both new."""

from __future__ import annotations

import os
from pathlib import Path

METADATA = ".meta.json"
PARTIAL = ".tmp"  # no object's file is named so, and ministack's loader passes over those that are
DECIDED = f"{METADATA}.next{PARTIAL}"


def write(path: str, data: bytes | bytearray, metadata: str) -> None:
    """Replace an object's data and metadata. Once the new metadata has its place beside the old, the write is decided,
    and `recover` would finish it."""
    _write(path + PARTIAL, data)
    _write(path + METADATA + PARTIAL, metadata.encode())
    os.replace(path + METADATA + PARTIAL, path + DECIDED)
    os.replace(path + PARTIAL, path)
    os.replace(path + DECIDED, path + METADATA)


def _write(path: str, data: bytes | bytearray) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def recover(folder: Path) -> None:
    """Finish the writes below `folder` that were decided when the emulator was killed, and forget the others."""
    partials = sorted(str(path) for path in folder.rglob(f"*{PARTIAL}"))
    for decided in [partial for partial in partials if partial.endswith(DECIDED)]:
        path = decided.removesuffix(DECIDED)
        if os.path.exists(path + PARTIAL):
            os.replace(path + PARTIAL, path)
        os.replace(decided, path + METADATA)
    for partial in partials:
        Path(partial).unlink(missing_ok=True)
