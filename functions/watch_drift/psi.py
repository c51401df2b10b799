"""The population stability index: how far two samples of one thing differ, and how far they would by chance. Pure.

PSI = sum over bins of (actual - expected) * ln(actual / expected), of shares. Below 0.1 nothing has changed, above 0.25
much has, goes an old rule of credit scoring; it is about samples of many thousands. Of smaller ones chance alone makes
more: where nothing has changed, PSI of B bins is about (1/n + 1/m) times a chi-square of B - 1 degrees of freedom, for
samples of n and m (Yurdakul 2018, Statistical Properties of Population Stability Index, Western Michigan University).
So both must be exceeded.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

T = TypeVar("T")

# One look in a thousand would take chance for drift: looking daily, at two things, that is one in one and a half years,
# and only where the threshold is lower than what chance makes.
CHANCE = 0.001
# Chi-square wants five expected in a bin (Cochran's rule), and many bins hide a shift in what they all vary by.
LEAST_EXPECTED, MOST_BINS = 5, 20
CONFIDENCE_BINS = 10
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Bin:
    name: str
    expected: float
    """Share of the first sample, 0 to 1."""
    actual: float
    """Share of the second."""


@dataclass(frozen=True)
class Shift:
    psi: float
    chance: float
    """What chance alone exceeds in a few of a thousand looks."""
    bins: list[Bin]

    def exceeds(self, threshold: float) -> bool:
        return self.psi > max(threshold, self.chance)

    @property
    def largest(self) -> Bin:
        """The bin that contributes most."""
        return max(self.bins, key=lambda b: _term(b.expected, b.actual))


def of_classes(expected: Sequence[str], actual: Sequence[str]) -> Shift:
    """Shift of the mix of classes. Classes too rare in `expected` share a bin, in the order of their names."""
    counts = Counter(expected)
    least = max(LEAST_EXPECTED, len(expected) / MOST_BINS)
    groups = [[name] for name, count in counts.most_common() if count >= least]
    open_group: list[str] = []
    for name in sorted(set(expected) | set(actual)):
        if counts[name] >= least:
            continue
        open_group.append(name)
        if sum(counts[member] for member in open_group) >= least:
            groups.append(open_group)
            open_group = []
    if open_group and groups:
        groups[-1] = groups[-1] + open_group
    elif open_group:
        groups = [open_group]
    where = {name: at for at, group in enumerate(groups) for name in group}
    return _shift(expected, actual, where.__getitem__, [_names(group) for group in groups])


def of_confidence(expected: Sequence[float], actual: Sequence[float]) -> Shift:
    """Shift of confidences (0 to 1), in bins that hold as many of `expected` each; equal ones share a bin.

    To three decimals: with the number of pictures in a request the last of float32's digits change.
    """
    old, new = sorted(round(value, 3) for value in expected), [round(value, 3) for value in actual]
    count = max(1, min(CONFIDENCE_BINS, len(old) // LEAST_EXPECTED))
    edges = sorted({old[len(old) * cut // count] for cut in range(1, count)} - {old[0]})
    bounds = [0.0, *edges, 1.0]
    names = [f"{low:.3f} to {high:.3f}" for low, high in zip(bounds, bounds[1:], strict=False)]
    return _shift(old, new, lambda value: bisect_right(edges, value), names)


def chi_square(degrees: int, beyond: float) -> float:
    """What a chi-square variable exceeds with probability `beyond` (Wilson and Hilferty 1931).

    At 0.001 it is 3 % too high for one degree of freedom, less for more.
    """
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + NormalDist().inv_cdf(1 - beyond) * math.sqrt(spread)) ** 3


def _shift(expected: Sequence[T], actual: Sequence[T], bin_of: Callable[[T], int], names: list[str]) -> Shift:
    old, new = Counter(map(bin_of, expected)), Counter(map(bin_of, actual))
    # Half a picture more in each bin: an empty one has no logarithm.
    share = lambda found, at: (found[at] + 0.5) / (found.total() + 0.5 * len(names))  # noqa: E731
    bins = [Bin(name, share(old, at), share(new, at)) for at, name in enumerate(names)]
    psi = sum(_term(b.expected, b.actual) for b in bins)
    chance = 0.0
    if len(bins) > 1:
        chance = (1 / len(expected) + 1 / len(actual)) * chi_square(len(bins) - 1, CHANCE)
    return Shift(psi, chance, bins)


def _term(expected: float, actual: float) -> float:
    return (actual - expected) * math.log(actual / expected)


def _names(group: list[str]) -> str:
    more = len(group) - NAMES_SHOWN
    return ", ".join(group[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
