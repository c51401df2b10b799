"""Class names as people write them: how they are normalised, and when two are spellings of one."""

import re
import unicodedata

CLASS_NAME = re.compile(r"[^\W_][\w .\-]{0,62}")  # letters and digits of any script, their marks left out
# Vowel signs and the like, of which \w knows nothing, and what joins letters or keeps them apart.
_MARKS, _JOINERS = ("Mn", "Mc"), "\u200c\u200d"


class BadLabel(ValueError):
    """A label that names no usable class; the text says why."""


def class_name(text: str) -> str:
    """The class that somebody wrote: composed characters (NFC), single spaces, none around; raises BadLabel."""
    name = unicodedata.normalize("NFC", " ".join(text.split()))
    bare = name[:1] + "".join("x" if c in _JOINERS or unicodedata.category(c) in _MARKS else c for c in name[1:])
    if not CLASS_NAME.fullmatch(bare):
        raise BadLabel(
            f"{text[:80]!r} is no class name: use up to 63 letters, digits, spaces, '_', '-', '.', "
            "first a letter or digit"
        )
    return name


def fold(name: str) -> str:
    """What two spellings of one class have in common: neither case nor what parts the words tells classes apart."""
    return unicodedata.normalize("NFC", re.sub(r"[\s_\-]", "", name.casefold()))
