"""How often the gate is wrong: of models whose true difference is known, the share that it blocks.

    python -m benchmarks.gate
    python -m benchmarks.gate --pictures 30 100 --differing 0.2 --max-drop 0.1

Nothing is drawn: each outcome of n test pictures (lost, won, the same) is put to the gate's own rules, and counts with
its probability. `differing`: the share of pictures that only one of the models gets right, were they equally good.
Beside it what other rules would do: the observed drop over the margin; McNemar's test alone; a test of non-inferiority,
where the whole interval must lie above the margin. The gate tests twice, over all pictures and over the older ones
alone, which costs it a little: the last line is what it does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import cache
from math import exp, lgamma, log
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "functions"))

from judge_challenger.gate import Thresholds, compare, no_large_drop, not_worse

CHANGES = (0.02, 0.0, -0.02, -0.04, -0.08, -0.16)  # of the share of pictures that is right
NEGLIGIBLE = 1e-7  # outcomes less probable are left out

Rule = Callable[[dict[str, Any], Thresholds], bool]


def observed(found: dict[str, Any], thresholds: Thresholds) -> bool:
    return found["change"] < -thresholds.margin - 1e-9


def mcnemar(found: dict[str, Any], thresholds: Thresholds) -> bool:
    return not not_worse(found, thresholds).passed


def inferior(found: dict[str, Any], thresholds: Thresholds) -> bool:
    return found["low"] < -thresholds.margin


def gate(found: dict[str, Any], thresholds: Thresholds) -> bool:
    return mcnemar(found, thresholds) or not no_large_drop(found, thresholds).passed


RULES: dict[str, Rule] = {"margin": observed, "McNemar": mcnemar, "non-inf.": inferior, "gate": gate}
TWICE = "gate, twice"  # over all pictures and, as the gate does, the older ones alone


@cache
def stops(lost: int, won: int, n: int, thresholds: Thresholds) -> dict[str, bool]:
    """By rule: whether it blocks where so many of n pictures are lost and won."""
    counts = {"n": n, "both": 0, "only_champion": lost, "only_challenger": won, "neither": n - lost - won}
    found = compare(counts, thresholds)
    return {name: rule(found, thresholds) for name, rule in RULES.items()}


def outcomes(n: int, lost: float, won: float) -> Iterator[tuple[int, int, float]]:
    """Pictures lost, pictures won and the probability of just that, where each is lost or won with these."""

    def power(share: float, count: int) -> float:
        return (count * log(share) if share > 0 else -1e9) if count else 0.0

    for a in range(n + 1):
        for b in range(n + 1 - a):
            ways = lgamma(n + 1) - lgamma(a + 1) - lgamma(b + 1) - lgamma(n - a - b + 1)
            probability = ways + power(lost, a) + power(won, b) + power(1 - lost - won, n - a - b)
            if probability > log(NEGLIGIBLE):
                yield a, b, exp(probability)


def blocked(n: int, differing: float, change: float, older: float, thresholds: Thresholds) -> dict[str, float]:
    """By rule: the probability of a block, of models that truly differ by `change`."""
    won = max((differing + change) / 2, change, 0.0)
    lost = won - change
    first = round(older * n)
    shares = dict.fromkeys([*RULES, TWICE], 0.0)
    newer = [*outcomes(n - first, lost, won)]
    for a, b, probability in outcomes(first, lost, won):
        known = stops(a, b, first, thresholds)["McNemar"] if first else False
        for c, d, further in newer:
            found = stops(a + c, b + d, n, thresholds)
            for name, blocks in (*found.items(), (TWICE, found["gate"] or known)):
                shares[name] += probability * further * blocks
    return shares


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[20, 30, 60, 100, 300], help="of the test")
    parser.add_argument("--differing", type=float, nargs="+", default=[0.1], help="share of them")
    parser.add_argument("--older", type=float, default=0.7, help="share that were in the champion's own test, too")
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--max-drop", type=float, default=0.2)
    parser.add_argument("--confidence", type=float, default=0.95)
    options = parser.parse_args()
    thresholds = Thresholds(
        accuracy_floor=0, margin=options.margin, max_drop=options.max_drop, confidence=options.confidence,
        min_test_pictures=1, class_floor=0, max_latency_ratio=1,
    )  # fmt: skip
    for differing in options.differing:
        bounds = f"margin {options.margin:.0%}, largest drop {options.max_drop:.0%}, {options.confidence:.0%} sure"
        print(f"share blocked, by the true change; answers differ on {differing:.0%} of the pictures; {bounds}")
        print(f"{'pictures':>8}  {'rule':<11}" + "".join(f"{change:>+8.0%}" for change in CHANGES))
        for n in options.pictures:
            found = [blocked(n, differing, change, options.older, thresholds) for change in CHANGES]
            for name in found[0]:
                print(f"{n:>8}  {name:<11}" + "".join(f"{shares[name]:>8.1%}" for shares in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
