"""What was done to a rollout, as a record; verdicts and filters."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from onpath.config.methods.trd import TRDOptions
from onpath.data.render import Renderer
from onpath.methods.trd.compare import edit_distance, is_foreign
from onpath.records import Edit, Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """A student's attempt y and what the teacher made of it, z.

    >>> from onpath.records import Prompt, Sampling
    >>> x = Prompt(id="0", text="7 + 5?")
    >>> y = Rollout(prompt=x, ids=(4, 2), logprobs=(-0.1, -0.2), finish_reason="stop",
    ...             policy_version=0, sampling=Sampling(), context=(1, 9))
    >>> Rewrite(attempt=y, asked=x, context=(1, 7, 4, 9), ids=(5, 2), finished=True,
    ...         attempt_right=False, right=True).cell
    'wrong_to_right'
    """

    attempt: Rollout
    """y."""
    asked: Prompt
    """The rewrite prompt r."""
    context: tuple[int, ...]
    """Its ids: the very ids that z continues, and in which z is scored."""
    ids: tuple[int, ...]
    """z, its stop token included if one was drawn."""
    finished: bool
    attempt_right: bool | None
    """None: there is no answer to compare with."""
    right: bool | None = None
    kind: str = "rewrite"
    """`rewrite`, `minimal_edit`, or `none` where y is left as it is."""
    detail: dict[str, Any] = field(default_factory=dict)
    read: Tensor | None = field(default=None, compare=False, repr=False)
    """The teacher's states that predict z, [tokens, H], where it has kept them."""

    @property
    def cell(self) -> str | None:
        """One of four: what y was and what z is."""
        if self.attempt_right is None or self.right is None:
            return None
        names = {True: "right", False: "wrong"}
        return f"{names[self.attempt_right]}_to_{names[self.right]}"


CELLS = ("right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")


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
