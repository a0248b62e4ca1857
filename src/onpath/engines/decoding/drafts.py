"""Draft tokens for a model that goes on from inside a response that it has just scored.

Scoring gives the model's likeliest token at every position of the response for nothing. Where the model goes
its own way and comes back to what the response says, those tokens are right again, at another place: so a
draft follows the last two generated tokens, or the last one, to where they stand in the response. A draft
only saves time: the model verifies it (speculative decoding, arXiv 2211.17192), and what is generated does
not depend on it. A text that a model is asked to rewrite is a draft likewise.
"""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor


class Drafts:
    """Of one response.

    >>> drafts = Drafts(start=3, response=[7, 8, 9, 4], likeliest=[7, 5, 9, 4])
    >>> drafts.propose(prefix_length=4, generated=[], max_tokens=2)
    [5, 9]
    >>> drafts.propose(prefix_length=4, generated=[6, 8, 9], max_tokens=2)  # 8, 9 stand at 1 and 2
    [4]

    Args:
        start: length of the context before the response.
        likeliest: the model's likeliest token at each position of the response.
        keeps: whether `read` is wanted, of one place of the row.
    """

    keeps = False
    read: Tensor | None = None
    """The model's hidden states that predict each token generated, [tokens, H]: those that it scores with.
    None: nobody followed the draft, or it reads otherwise when it scores (autocast)."""

    def __init__(
        self, *, start: int, response: Sequence[int], likeliest: Sequence[int], keeps: bool = False
    ) -> None:
        self.start, self.response, self.likeliest = start, tuple(response), list(likeliest)
        self.keeps = keeps

    def unkept(self) -> "Drafts":
        """The same, of which nothing is kept: who follows it is not who scores."""
        return Drafts(start=self.start, response=self.response, likeliest=self.likeliest)

    @classmethod
    def of_text(cls, text: Sequence[int], *, start: int, keeps: bool = False) -> "Drafts":
        """Of a text that is likely to be repeated after the first `start` tokens of a row.

        >>> Drafts.of_text([7, 8, 9], start=3).propose(prefix_length=3, generated=[7], max_tokens=2)
        [8, 9]
        """
        return cls(start=start, response=text, likeliest=text, keeps=keeps)

    @cached_property
    def _after(self) -> dict[int, list[int]]:
        """Token → the places after it."""
        found: dict[int, list[int]] = {}
        for at, token in enumerate(self.response[:-1], start=1):
            found.setdefault(token, []).append(at)
        return found

    def propose(self, *, prefix_length: int, generated: Sequence[int], max_tokens: int) -> list[int]:
        """Draft tokens to follow `generated`, which follows the first `prefix_length` tokens of the row."""
        prefix = prefix_length - self.start
        at = prefix + len(generated)
        if generated:
            before = (*self.response[max(0, prefix - 1) : prefix], *generated)
            places = self._after.get(before[-1], [])
            pairs = [p for p in places if p > 1 and self.response[p - 2 : p] == before[-2:]]
            at = min(pairs or places, key=lambda place: abs(place - at), default=at)
        return self.likeliest[at : at + max_tokens]
