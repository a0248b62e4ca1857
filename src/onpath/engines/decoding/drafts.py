"""What a model will probably write from inside a response that it has just scored.

Scoring gives the model's likeliest token at every position of the response for nothing. Where the model goes
its own way and comes back to what the response says, those tokens are right again, at another place: so a
draft follows the last two tokens written, or the last one, to where they stand in the response. A draft only
saves time: the model checks it (speculative decoding, arXiv 2211.17192), and what is written does not depend
on it.
"""

from collections.abc import Sequence
from functools import cached_property


class Drafts:
    """Of one response.

    >>> drafts = Drafts(start=3, response=[7, 8, 9, 4], likeliest=[7, 5, 9, 4])
    >>> drafts.after(length=4, written=[], room=2)
    [5, 9]
    >>> drafts.after(length=4, written=[6, 8, 9], room=2)  # 8, 9 stand at 1 and 2: what comes at 3?
    [4]

    Args:
        start: length of the context before the response.
        likeliest: the model's likeliest token at each position of the response.
    """

    def __init__(self, *, start: int, response: Sequence[int], likeliest: Sequence[int]) -> None:
        self.start, self.response, self.likeliest = start, tuple(response), list(likeliest)

    @cached_property
    def _after(self) -> dict[int, list[int]]:
        """Token → the places after it."""
        found: dict[int, list[int]] = {}
        for at, token in enumerate(self.response[:-1], start=1):
            found.setdefault(token, []).append(at)
        return found

    def after(self, *, length: int, written: Sequence[int], room: int) -> list[int]:
        """At most `room` tokens that may follow `written`, which follows the row's first `length` tokens."""
        at = length - self.start + len(written)
        if written:
            before = (*self.response[max(0, length - self.start - 1) : length - self.start], *written)
            places = self._after.get(before[-1], [])
            pairs = [p for p in places if p > 1 and self.response[p - 2 : p] == before[-2:]]
            at = min(pairs or places, key=lambda place: abs(place - at), default=at)
        return self.likeliest[at : at + room]
