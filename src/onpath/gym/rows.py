"""Rows of problems that are made up: all different, and the same for the same seed."""

import random
from collections.abc import Callable
from functools import lru_cache

Row = dict[str, str]
Make = Callable[[random.Random, str], tuple[str, Row]]
"""A random problem of a split: what it is told apart by, and its row without an id."""


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
