"""What a labelled picture is known by: the hash of its content, under which it is kept, and what it looks like."""

import hashlib
import os

from botocore.exceptions import ClientError
from PIL import Image

from common import aws, limits
from common.events import ObjectEvent
from common.objects import fetch, put_if_absent
from preprocessing import BrokenImage, Preprocess, decode, inspect

ARCHIVED = "InvalidObjectState"  # S3's answer about an object that no further try will read


def take(event: ObjectEvent) -> tuple[str, str] | None:
    """Keep the picture under its content's hash; returns that and its difference hash, None where it is gone.

    BrokenImage with the reason where it is no picture, or none that any further try will read. What the function may
    not read is trouble for now: somebody can put the permissions right, and send the dead letters again.
    """
    limits.check_size(event)
    try:
        data = fetch(event)
    except ClientError as error:
        if aws.code(error) != ARCHIVED:
            raise
        raise BrokenImage(unreadable(event.bucket, event.key, error)) from error
    if data is None:
        return None
    header = inspect(data, Preprocess.default(), **limits.of_a_picture())
    # Here a JPEG, too, is decoded in full; it may have to be turned, and is then made grey.
    needed, free = len(data) + max(header.bytes_needed, 9 * header.width * header.height), limits.free_memory()
    if needed > free:  # else the function dies, and with it the labels beside this one
        takes = f"{header.width}x{header.height} pixels take {needed / 1e9:.1f} GB to decode"
        raise BrokenImage(f"{takes}; there are {free / 1e9:.1f}: scale the picture down")
    return keep(data), difference_hash(decode(data, **limits.of_a_picture()))


def unreadable(bucket: str, key: str, error: ClientError) -> str:
    return f"s3://{bucket}/{key} cannot be read: {aws.code(error)}"


def keep(data: bytes) -> str:
    """Store the picture under its content's hash, unless it is there; returns the hash."""
    sha256 = hashlib.sha256(data).hexdigest()
    put_if_absent(os.environ["ARTIFACT_BUCKET"], f"images/{sha256}", data)
    return sha256


def difference_hash(picture: Image.Image) -> str:
    """128 bits, as 32 hexadecimal digits: is each pixel of the picture, small and in grey, darker than the next?

    64 compare each pixel of 9x8 with its right neighbour, 64 each of 8x9 with the one below. Survives rescaling and
    recompression (Krawetz 2013, 'Kind of Like That').
    """
    grey = picture.convert("L")
    across = grey.resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    down = grey.resize((8, 9), Image.Resampling.LANCZOS).tobytes()
    bits = [across[at] < across[at + 1] for row in range(8) for at in range(row * 9, row * 9 + 8)]
    bits += [down[at] < down[at + 8] for at in range(64)]
    return f"{int(''.join('01'[bit] for bit in bits), 2):032x}"
