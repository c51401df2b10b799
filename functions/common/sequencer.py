"""Places in the order of a key's versions for one that no event told of: it was found by listing the bucket.

S3 gives sequencers in events only. A made one is the sequencer of the picture's row, or zeros where there is none, with
something in the last places, which no event ever fills: it comes after the row, and before whatever happens to the
key next. Among themselves made ones come in the order in which the versions were written.

What this cannot know: an event that is late, not lost, and of a version between the row's and the one that was found,
comes after the made sequencer although it is older. So whoever meets a row with a made sequencer, and an event of
another version, asks S3 which version is the newest (`is_made`).
"""

from datetime import datetime

from common.events import SEQUENCER_WIDTH

TAIL = 16  # hexadecimal places at the end; AWS fills 16 to 18 at the beginning
NONE = "0" * SEQUENCER_WIDTH


def after(sequencer: str, written: datetime) -> str:
    """A sequencer after that of the row, for a version that was written at this time; the same for the same version."""
    head, tail = sequencer[:-TAIL], sequencer[-TAIL:]
    return f"{head}{max(int(tail, 16) + 1, int(written.timestamp() * 1000)):0{TAIL}X}"


def is_made(sequencer: str) -> bool:
    """Whether the sequencer was made here, so that its place among those of events is not certain."""
    return bool(sequencer[-TAIL:].strip("0"))
