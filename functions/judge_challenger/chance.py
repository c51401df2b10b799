"""What a number of test pictures can and cannot show: exact tests and published intervals, in plain Python.

Counts are of pictures. `lost` are those that only the champion got right, `won` those that only the challenger did.
Everything is one-sided: the question is whether the challenger is worse, not whether it differs.
"""

from collections.abc import Callable
from math import comb, sqrt
from statistics import NormalDist

POWER = 0.8  # how surely a drop is to be seen that is called visible; the customary value


def quantile(confidence: float) -> float:
    """Of the normal distribution."""
    return NormalDist().inv_cdf(confidence)


def mcnemar(lost: int, won: int) -> float:
    """How probable it is that of two equally good models the challenger loses so many pictures, or more.

    McNemar's test, of which only the pictures count that one of the two got right: each is a coin tossed. As mid-p: the
    case at hand counts half. The exact test counts it whole, and with few pictures misses twice as much for it, while
    the mid-p keeps to its level (Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13:91, 2013).
    """
    tosses, case = lost + won, comb(lost + won, lost)
    term, beyond = case, 0
    for heads in range(lost, tosses):
        term = term * (tosses - heads) // (heads + 1)
        beyond += term
    return (2 * beyond + case) / 2 ** (tosses + 1)


def fisher(right: int, n: int, other_right: int, other_n: int) -> float:
    """How probable it is that so few of `n` answers are right, or fewer, if the share is that of the others.

    Fisher's exact test, of two unpaired shares. Of two models' answers to the same pictures it does not see which ones
    they are: models that find the same pictures hard differ less than it allows for, so it errs on the careful side. It
    is for classes of a few pictures, where McNemar's test cannot speak up at all: seven pictures that are all lost
    are seven tosses to it, 0.4 %, which is nothing among a hundred classes.
    """
    total = right + other_right
    ways = sum(comb(n, k) * comb(other_n, total - k) for k in range(max(0, total - other_n), right + 1))
    return ways / comb(n + other_n, total)


def wilson(right: int, n: int, confidence: float) -> tuple[float, float]:
    """Share that a model gets right, from `right` of `n`: bounds, each one-sided (Wilson, JASA 22:209, 1927)."""
    z = quantile(confidence)
    centre, spread = right + z * z / 2, z * sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def tango(lost: int, won: int, n: int, confidence: float) -> tuple[float, float]:
    """Change of the share of `n` pictures that is right, (won - lost) / n: bounds, each one-sided.

    Tango's score interval for paired proportions (Statistics in Medicine 17:891, 1998): the changes that are not
    further off than the normal quantile. Unlike Wald's it holds with few pictures, and has a width where none differ.
    """
    return _lowest(lost, won, n, quantile(confidence)), -_lowest(won, lost, n, quantile(confidence))


def _lowest(lost: int, won: int, n: int, z: float) -> float:
    def explains(change: float) -> bool:
        # The likeliest share of pictures lost, if that were the change: the root of a x^2 + b x + c.
        a, b, c = 2 * n, -lost - won + (2 * n + lost - won) * change, -lost * change * (1 - change)
        share = (sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        return won - lost - n * change < z * sqrt(max(0.0, n * (2 * share + change * (1 - change))))

    return _first(explains, -1.0, (won - lost) / n)


def visible_drop(n: int, differing: int, confidence: float, margin: float) -> float:
    """The smallest true drop that the gate blocks with a probability of POWER, as a share of `n` pictures; at most 1.

    `differing`: pictures that only one of the models got right. Normal approximation (Connor, Biometrics 43:207, 1987),
    with the observed drop over `margin` as a second condition.
    """

    def seen(drop: float) -> bool:
        share = max(differing / n, drop)
        needed = max(quantile(confidence) * sqrt(n * share), n * margin)
        return n * drop - quantile(POWER) * sqrt(n * (share - drop * drop)) >= needed

    return _first(seen, 0.0, 1.0)


def _first(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least value between the two from which on it `holds`; `high` if there is none."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
