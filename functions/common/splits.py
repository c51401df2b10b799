"""Which split a picture belongs to: that of the pictures it looks like, dealt out when the first of them is seen.

A split never changes, or a model would be tested on what its champion was trained on. Pictures look alike when their
difference hashes (128 bits) differ in at most NEAR. Pure functions; the snapshot saves what they decide.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, combinations, pairwise, product

SPLITS = ("train", "validation", "test")
# Groups of one class are dealt to the splits in this order, over and over: 60 % train, 20 % validation, 20 % test,
# and a class of five pictures has some of each.
DEAL = ("train", "test", "validation", "train", "train", "train", "test", "validation", "train", "train")

# Measured on 250 photographs and 700 drawn pictures (docs/labels.md): copies that were rescaled, recompressed,
# brightened or turned by a degree differ in 0 to 10 bits, different pictures in 18 or more.
HASH_BITS = 128
NEAR = 10


@dataclass(frozen=True)
class Splits:
    """What was dealt: the split of each difference hash (hexadecimal), and how many groups each class was dealt."""

    of: dict[str, str] = field(default_factory=dict)
    dealt: dict[str, int] = field(default_factory=dict)


def assign(classes: dict[str, str], known: Splits) -> tuple[Splits, dict[str, list[str]]]:
    """Splits for those hashes of `classes` (hash: class) that are not known, and the hashes that would join two.

    A new hash takes the split of its neighbours, near first, then what is near those; a group without known neighbours
    is dealt its class's next split. One that has neighbours in two splits gets none, and is returned with them. Follows
    from the arguments alone, whatever order they are in.
    """
    order = sorted((hash for hash in classes if hash not in known.of), key=lambda hash: (classes[hash], hash))
    near = neighbours(order, known.of)
    settled, waiting = dict(known.of), set(order)
    found, dealt, torn = dict[str, str](), dict(known.dealt), dict[str, list[str]]()
    queue = deque(hash for hash in order if any(other in settled for other in near[hash]))

    def settle(hash: str, split: str) -> None:
        found[hash] = settled[hash] = split
        waiting.discard(hash)
        queue.extend(sorted(near[hash]))

    def spread() -> None:
        while queue:
            if (hash := queue.popleft()) in waiting:
                splits = sorted({settled[other] for other in near[hash] if other in settled})
                if len(splits) == 1:
                    settle(hash, splits[0])
                else:
                    waiting.remove(hash)
                    torn[hash] = splits

    spread()
    for hash in order:
        if hash in waiting:  # nothing that it looks like has a split
            name = classes[hash]
            settle(hash, DEAL[dealt.get(name, 0) % len(DEAL)])
            dealt[name] = dealt.get(name, 0) + 1
            spread()
    return Splits(found, {name: count for name, count in dealt.items() if count != known.dealt.get(name)}), torn


def neighbours(new: Iterable[str], known: Iterable[str], within: int = NEAR) -> dict[str, set[str]]:
    """For each hash of `new` all others, of `new` or `known`, that differ from it in at most `within` bits.

    Exact: of within + 1 bands of two such hashes at least one is the same (pigeonhole), so only hashes that share a
    band are compared. Two that are known are not.
    """
    names = {int(hash, 16): hash for hash in known}
    fresh = {int(hash, 16): hash for hash in new}
    names |= fresh
    near: dict[str, set[str]] = {hash: set() for hash in fresh.values()}
    edges = [round(band * HASH_BITS / (within + 1)) for band in range(within + 2)]
    for low, high in pairwise(edges):
        mask = (1 << high) - (1 << low)
        bands = defaultdict[int, tuple[list[int], list[int]]](lambda: ([], []))
        for number in names:
            bands[number & mask][number in fresh].append(number)
        for olds, news in bands.values():
            for one, other in chain(combinations(news, 2), product(news, olds)):
                if (one ^ other).bit_count() <= within:
                    near[names[one]].add(names[other])
                    if other in fresh:
                        near[names[other]].add(names[one])
    return near
