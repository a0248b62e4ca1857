"""What was done to a rollout, as a record; verdicts, filters, and measures of an edit. Plain Python and
numpy."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onpath.grade import Grader
from onpath.options import TRDOptions
from onpath.records import Edit, Rollout
from onpath.render import Renderer


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """A student's attempt y and what the teacher made of it, z.

    >>> from onpath.records import Prompt, Sampling
    >>> y = Rollout(prompt=Prompt(id="0", text="7 + 5?"), ids=(4, 2), logprobs=(-0.1, -0.2),
    finish_reason="stop", ...             policy_version=0, sampling=Sampling(), context=(1, 9))
    >>> Rewrite(attempt=y, context=(1, 7, 4, 9), ids=(5, 2), finished=True, attempt_right=False,
    right=True).cell 'wrong_to_right'
    """

    attempt: Rollout
    """y."""
    context: tuple[int, ...]
    """The rewrite prompt: the very ids that z continues, and in which z is scored."""
    ids: tuple[int, ...]
    """z, its stop token included if one was drawn."""
    finished: bool
    attempt_right: bool | None
    """None: there is no answer to compare with."""
    right: bool | None = None
    kind: str = "rewrite"
    """`rewrite`, `minimal_edit`, or `none` where y is left as it is."""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def cell(self) -> str | None:
        """One of four: what y was and what z is."""
        if self.attempt_right is None or self.right is None:
            return None
        names = {True: "right", False: "wrong"}
        return f"{names[self.attempt_right]}_to_{names[self.right]}"


CELLS = ("right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")


def verdicts(
    grader: Grader, renderer: Renderer, pairs: Sequence[tuple[Rollout, tuple[int, ...]]]
) -> list[bool | None]:
    """Whether each response (the ids) answers its rollout's prompt; None without an answer to compare
    with."""
    known = [(renderer.text(ids), r.prompt.answer) for r, ids in pairs if r.prompt.answer is not None]
    found = iter(grader.grade_many(known))
    return [None if r.prompt.answer is None else next(found).correct for r, _ in pairs]


def why_dropped(rewrite: Rewrite, options: TRDOptions, text: str) -> str:
    """The reason why a rewrite is not trained on; empty if it is."""
    if rewrite.kind == "none" and options.refine == "wrong_only":
        return "attempt is right"
    if not text.strip():
        return "empty"
    if not rewrite.finished and (options.unfinished == "drop" or options.filter == "drop_harmed"):
        return "unfinished"
    if rewrite.cell == "right_to_wrong" and options.filter == "drop_harmed":
        return "harmed"
    if rewrite.cell != "wrong_to_right" and options.filter == "wrong_to_right":
        return "not repaired"
    return ""


def as_edit(rewrite: Rewrite, options: TRDOptions, renderer: Renderer) -> Edit:
    """The record of an edit, with what can be said of it without a model."""
    y, z, text = rewrite.attempt.ids, rewrite.ids, renderer.text(rewrite.ids)
    reason = why_dropped(rewrite, options, text)
    known = f"{rewrite.attempt.prompt.question} {renderer.text(y)}"
    detail = {
        "attempt_right": rewrite.attempt_right,
        "right": rewrite.right,
        "finished": rewrite.finished,
        "edit_distance": edit_distance(y, z),
        "length_ratio": len(z) / max(1, len(y)),
        "empty": not text.strip(),
        "identical": y == z,
        "foreign": is_foreign(text, known=known),
        **rewrite.detail,
    }
    return Edit(kind=rewrite.kind, kept=not reason, reason=reason or "kept", detail=detail)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and substitutions of tokens that make b of a.

    Row by row; insertions within a row are a running minimum: d_j = min_{k ≤ j} (d'_k + j − k).

    >>> edit_distance((1, 2, 3), (1, 3, 4))
    2
    """
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
