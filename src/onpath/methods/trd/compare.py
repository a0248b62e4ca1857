"""Two responses side by side: how many tokens differ, and whether one is in another script."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from onpath.system.text import shared_start


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and substitutions of tokens that make b of a.

    What they begin and end with alike costs nothing. Between, row by row; insertions within a row are a
    running minimum: d_j = min_{k ≤ j} (d'_k + j − k).

    >>> edit_distance((1, 2, 3), (1, 3, 4))
    2
    """
    same = shared_start(a, b)
    a, b = a[same:], b[same:]
    if same := shared_start(a[::-1], b[::-1]):
        a, b = a[:-same], b[:-same]
    target, steps = np.asarray(b, dtype=np.int64), np.arange(len(b) + 1)
    row = steps.copy()
    for i, token in enumerate(a, start=1):
        candidate = row + 1
        candidate[0] = i
        np.minimum(candidate[1:], row[:-1] + (target != token), out=candidate[1:])
        row = np.minimum.accumulate(candidate - steps) + steps
    return int(row[-1])


def is_foreign(text: str, *, known: str) -> bool:
    """Whether most letters of a text belong to scripts (Latin, Cyrillic, CJK, …) that `known` does not use.

    >>> is_foreign("сумма равна 12", known="7 + 5 = ?  so it is 12")
    True
    """
    letters = [_script(c) for c in text if c.isalpha()]
    homely = {_script(c) for c in known if c.isalpha()}
    return bool(homely) and sum(s not in homely for s in letters) * 2 > len(letters)


def _script(letter: str) -> str:
    return unicodedata.name(letter, "?").split()[0]
