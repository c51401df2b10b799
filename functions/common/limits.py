"""What a picture may be, by the parameters of the stack, and what memory a function has for it."""

import os

from common.events import ObjectEvent
from preprocessing import BrokenImage

MEBI = 1 << 20
OWN_MEMORY = 256 * MEBI  # interpreter, SDK and threads, and the interpreter of a process that decodes


def of_a_picture() -> dict[str, int]:
    """As preprocessing takes it."""
    return {
        "max_bytes": int(os.environ["MAX_IMAGE_BYTES"]),
        "max_pixels": int(os.environ["MAX_IMAGE_PIXELS"]),
        "min_side": int(os.environ["MIN_IMAGE_SIDE"]),
    }


def check_size(event: ObjectEvent) -> None:
    """Before it is fetched: BrokenImage where the object is too large."""
    most = of_a_picture()["max_bytes"]
    if event.size > most:
        raise BrokenImage(f"larger than {most // 1_000_000} MB: {event.size / 1e6:.1f} MB")


def free_memory() -> int:
    """Bytes that this function has beside what it takes itself."""
    return max(64 * MEBI, int(os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "1769")) * MEBI - OWN_MEMORY)
