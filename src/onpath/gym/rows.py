"""Rows of problems that are made up: all different, the same for the same seed, each in one split."""

import hashlib
import random
from collections.abc import Callable
from functools import lru_cache

Row = dict[str, str]
Make = Callable[[random.Random, str], tuple[str, Row]]
"""A random problem of a split: what it is told apart by, and its row without an id."""


def hashed_split(meaning: str, size: int, *, longest: int) -> str:
    """The split a problem belongs to, by a hash of its meaning: no problem is in two.

    Args:
        longest: size beyond which a problem that is not trained on is `hard`.
    """
    bucket = int.from_bytes(hashlib.blake2b(meaning.encode(), digest_size=4).digest(), "big") % 100
    if bucket >= 30:
        return "train"
    if size > longest:
        return "hard"
    return "test" if bucket >= 10 else "validation"


def distinct_rows(make: Make, split: str, n: int, seed: int, *, stream: str) -> list[Row]:
    """`n` different problems; the first ones do not depend on `n`.

    Args:
        stream: names the random numbers.
    """
    return [dict(row) for row in _made(make, split, n, seed, stream)]


@lru_cache(maxsize=16)  # runs in one process ask for the same ones again and again
def _made(make: Make, split: str, n: int, seed: int, stream: str) -> tuple[Row, ...]:
    rng = random.Random(stream)
    found: dict[str, Row] = {}
    while len(found) < n:
        one, row = make(rng, split)
        found.setdefault(one, {"id": f"{split}-{seed}-{len(found)}", **row})
    return tuple(found.values())
