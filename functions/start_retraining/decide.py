"""Whether there is something to learn, and since when it waits. Pure functions."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from common import clock
from common.dataset import Dataset
from common.ledger import Ledger


@dataclass(frozen=True)
class News:
    """What a run would learn from, and how much of it the last one did not have."""

    pictures: int
    classes: int
    new_classes: dict[str, int]
    """Pictures of each class that the last run did not have."""
    new_pictures: int
    """Of the other classes."""
    first: bool
    """Nothing is known of a run before."""


def seconds_to_wait(entry: Ledger, now: datetime, quiet: int, longest: int) -> float:
    """How long until the labels have been quiet for `quiet` seconds, or have waited for `longest`; 0 or less: now."""
    until = clock.parse(entry.changed_at) + timedelta(seconds=quiet)
    if entry.waiting_since:
        until = min(until, clock.parse(entry.waiting_since) + timedelta(seconds=longest))
    return (until - now).total_seconds()


def news(found: Dataset, last: Dataset | None) -> News:
    """Compare `found` with what the last training had.

    A picture is new if that had it not, or had it as another class, whenever it was labelled: what contradicted itself
    and was mended is, and what was labelled again, or lies elsewhere now, is not.
    """
    known = set(last.classes) if last else set()
    had = {(p.sha256, p.class_name) for p in last.pictures} if last else set()
    of_new = Counter(p.class_name for p in found.pictures if p.class_name not in known)
    new_pictures = sum(p.class_name in known and (p.sha256, p.class_name) not in had for p in found.pictures)
    return News(len(found.pictures), len(found.classes), dict(sorted(of_new.items())), new_pictures, last is None)


def reason(news: News, min_new_pictures: int) -> tuple[bool, str]:
    """Whether `news` are worth a run, and why or why not.

    A class that takes part for the first time is reason enough, however few pictures the others got.
    """
    if news.first:
        return True, f"the first run, on {_count(news.pictures, 'picture')} of {news.classes} classes"
    if news.new_classes:
        named = ", ".join(f"{name} ({count})" for name, count in list(news.new_classes.items())[:10])
        more = f" and {len(news.new_classes) - 10} more" if len(news.new_classes) > 10 else ""
        also = f"; {_count(news.new_pictures, 'new picture')} of known classes" if news.new_pictures else ""
        return True, f"{_count(len(news.new_classes), 'new class', 'new classes')}: {named}{more}{also}"
    if news.new_pictures >= min_new_pictures:
        return True, f"{_count(news.new_pictures, 'new picture')} of known classes, and {min_new_pictures} are enough"
    missing = min_new_pictures - news.new_pictures
    return False, (
        f"{_count(news.new_pictures, 'new picture')} of known classes, of the {min_new_pictures} that a run needs: "
        f"{missing} missing; and no new class"
    )


def why_not_to_be_judged(found: Dataset, known: Iterable[str], min_test_pictures: int) -> str | None:
    """Why the gate could only reject what is trained on `found`, in words, or None: it has too few test pictures.

    As the gate does, those of the classes count that the champion knows, too (`known`); all, if it knows none.
    """
    common = set(found.classes) & set(known)
    tested = sum(p.split == "test" and (not common or p.class_name in common) for p in found.pictures)
    if tested >= min_test_pictures:
        return None
    missing = min_test_pictures - tested
    which = " of classes that the live model knows" if common else ""
    return (
        f"{_count(tested, 'test picture')}{which} of the {min_test_pictures} that the gate needs to judge a model: "
        f"label about {5 * missing} more, of which a fifth will be test pictures"
    )


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
