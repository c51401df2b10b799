"""Which split a picture belongs to: that of the pictures it looks like, dealt out when the first of them is seen.

A split never changes, or a model would be tested on what its champion was trained on. Pictures look alike when their
difference hashes (128 bits) differ in at most NEAR. Pure functions; the snapshot saves what they decide.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

SPLITS = ("train", "validation", "test")
# Groups of one class are dealt to the splits in this order, over and over: 60 % train, 20 % validation, 20 % test,
# and a class of five pictures has some of each.
DEAL = ("train", "test", "validation", "train", "train", "train", "test", "validation", "train", "train")

# Measured on 250 photographs and 700 drawn pictures (docs/labels.md): of copies that were rescaled, recompressed,
# brightened or turned by a degree nearly all differ in at most 10 bits, different pictures in 18 or more.
HASH_BITS = 128
NEAR = 10
# Of NEAR + 1 parts of two such hashes at least one is the same (pigeonhole), so only those that share a part, which
# these masks cut out, are compared; the result is exact.
BANDS = [(1 << high) - (1 << low) for low, high in pairwise(round(n * HASH_BITS / (NEAR + 1)) for n in range(NEAR + 2))]


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
    social = alike(order, known.of)
    # Who has not heard yet of a neighbour in each split.
    deaf = {split: Lookalikes(hash for hash in order if hash in social) for split in SPLITS}
    heard: dict[str, set[str]] = {hash: set() for hash in order}
    found, dealt, torn = dict[str, str](), dict(known.dealt), dict[str, list[str]]()
    queue, queued = deque[str](), set[str]()

    def tell(hash: str, split: str) -> set[str]:
        """Have those that look like `hash` hear of its split; returns who heard of any for the first time."""
        near = deaf[split].take(hash)
        for other in near:
            heard[other].add(split)
        first = near - queued
        queued.update(first)
        return first

    def settle(hash: str, split: str) -> None:
        found[hash] = split
        if hash in social:
            queue.extend(sorted(tell(hash, split)))

    def spread() -> None:
        while queue:
            hash = queue.popleft()
            if len(heard[hash]) == 1:
                settle(hash, *heard[hash])
            else:
                torn[hash] = sorted(heard[hash])

    for hash, split in known.of.items():
        tell(hash, split)
    queue.extend(hash for hash in order if hash in queued)
    spread()
    for hash in order:
        if hash not in queued:  # nothing that it looks like has a split
            queued.add(hash)
            name = classes[hash]
            settle(hash, DEAL[dealt.get(name, 0) % len(DEAL)])
            dealt[name] = dealt.get(name, 0) + 1
            spread()
    return Splits(found, {name: count for name, count in dealt.items() if count != known.dealt.get(name)}), torn


class Lookalikes:
    """Hashes, to be found once by another that differs from them in at most NEAR bits.

    None is found twice: thousands of pictures of one scene make millions of pairs.
    """

    def __init__(self, hashes: Iterable[str]) -> None:
        self._names, self._found = {int(hash, 16): hash for hash in hashes}, set[int]()
        self._bands = [(mask, _by_band(self._names, mask)) for mask in BANDS]

    def take(self, hash: str) -> set[str]:
        """Those that look like `hash`; they are not found again, and itself neither now nor later."""
        number, near = int(hash, 16), set[int]()
        for mask, those in self._bands:
            same = those.get(number & mask, [])
            if close := [other for other in same if (number ^ other).bit_count() <= NEAR]:
                near.update(close)
                those[number & mask] = [other for other in same if (number ^ other).bit_count() > NEAR]
        near = {other for other in near if other != number and other not in self._found}
        self._found |= near | {number}
        return {self._names[other] for other in near}


def alike(new: Iterable[str], known: Iterable[str]) -> set[str]:
    """Those of `new` that look like any other, new or known.

    Mostly few: the search goes a band at a time, which takes little memory and stays in the processor's caches.
    """
    names, old = {int(hash, 16): hash for hash in new}, [int(hash, 16) for hash in known]
    found: set[int] = set()
    for mask in BANDS:
        for same in _by_band(names, mask).values():
            for one in same:
                if one not in found:
                    near = [other for other in same if (one ^ other).bit_count() <= NEAR]
                    found.update(near if len(near) > 1 else ())
        rest = _by_band(names.keys() - found, mask)
        for one in old:
            found.update(other for other in rest.get(one & mask, ()) if (one ^ other).bit_count() <= NEAR)
    return {names[number] for number in found}


def _by_band(numbers: Iterable[int], mask: int) -> dict[int, list[int]]:
    those = defaultdict[int, list[int]](list)
    for number in numbers:
        those[number & mask].append(number)
    return dict(those)
