"""A divergence by its pure function, and its gradient by autograd: whatever has no gradient made by hand.

A function of the user's own is not trusted: each answer is looked at, and what cannot be right is refused
with the function's name.

Shape suffixes: R rows, k outcomes (the vocabulary, or a set and its tail).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onpath import divergence
from onpath.losses.objective import Objective, takes_names
from onpath.system import code
from onpath.system.errors import UserError, is_lack_of_memory


def divergence_of(objective: Objective, teacher_logp_Rk: Tensor, student_logp_Rk: Tensor) -> Tensor:
    """The value [R] of the function that the objective names or is.

    Raises:
        UserError: a function of the user's own gave another shape, or a value that no divergence has.
    """
    if callable(objective.kind):
        return _own(objective.kind, _named(objective), teacher_logp_Rk, student_logp_Rk)
    options = {} if objective.beta is None else {"beta": objective.beta}
    return divergence.DIVERGENCES[objective.kind](
        teacher_logp=teacher_logp_Rk, student_logp=student_logp_Rk, entry_clip=objective.entry_clip, **options
    )


@torch.enable_grad()
def slopes(objective: Objective, value_R: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """∂Σvalue/∂leaf for each leaf ([R] or [R, k]); zeros for one that the value does not depend on.

    Raises:
        UserError: a function of the user's own has no gradient, or none that is finite where its value is.
    """
    found: Sequence[Tensor | None] = [None] * len(leaves)
    modules = code.modules_of(objective.kind) if callable(objective.kind) else ()
    if value_R.requires_grad:
        with code.blamed(f"{_named(objective)}: its gradient", modules):
            found = torch.autograd.grad(value_R.sum(), leaves, allow_unused=True)
    if callable(objective.kind):
        _check_slopes(_named(objective), value_R, found)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def _named(objective: Objective) -> str:
    return f"divergence {objective.name}"


def _own(function: Callable[..., Any], name: str, teacher_logp_Rk: Tensor, student_logp_Rk: Tensor) -> Tensor:
    # What both sides exclude (masked vocabulary, an id that a union has twice) would be −inf − −inf in most
    # formulas. With the smallest normal probability on both sides it adds nothing and has no gradient.
    neither_Rk = teacher_logp_Rk.isneginf() & student_logp_Rk.isneginf()
    floor = math.log(torch.finfo(student_logp_Rk.dtype).tiny)
    teacher_Rk, student_Rk = (x.masked_fill(neither_Rk, floor) for x in (teacher_logp_Rk, student_logp_Rk))
    try:
        value_R = (
            function(teacher_logp=teacher_Rk, student_logp=student_Rk)
            if takes_names(function)
            else function(teacher_Rk, student_Rk)
        )
    except code.FAILURES as error:
        if isinstance(error, Exception) and is_lack_of_memory(error):  # of which the run says more
            raise
        raise code.failure(name, error, code.modules_of(function)) from error
    _check_value(name, value_R, teacher_Rk, student_Rk)
    checked: Tensor = value_R
    return checked


def _check_value(name: str, value_R: object, teacher_Rk: Tensor, student_Rk: Tensor) -> None:
    wanted = student_Rk.shape[:-1]
    if not isinstance(value_R, Tensor) or value_R.shape != wanted:
        given = f"shape {[*value_R.shape]}" if isinstance(value_R, Tensor) else type(value_R).__name__
        raise UserError(
            f"{name} gave {given} for log-probs of shape {[*student_Rk.shape]}: a divergence sums over the "
            f"last axis and nothing else, so a tensor of shape {[*wanted]} would be right"
        )
    finite_R = (teacher_Rk.isfinite() & student_Rk.isfinite()).all(-1)
    if not bool((value_R.isfinite() | ~finite_R).all()):
        raise UserError(
            f"{name} is not finite where all log-probs are: work with log-probs, since probabilities and "
            "their quotients underflow"
        )
    # +inf is right where one side alone excludes an outcome, so that only nan and −inf are refused here. Rows
    # of logits that are no numbers are not the function's fault: the token may have weight 0.
    numbers_R = ((teacher_Rk < torch.inf) & (student_Rk < torch.inf)).all(-1)
    if not bool(((value_R > -torch.inf) | ~numbers_R).all()):
        raise UserError(
            f"{name} gives no number where one side excludes an outcome (log-prob −inf): mask before any "
            "arithmetic, so that 0·log 0 is 0; +inf is right if the divergence has no bound"
        )


def _check_slopes(name: str, value_R: Tensor, found: Sequence[Tensor | None]) -> None:
    given = [g for g in found if g is not None]
    if not given:
        raise UserError(
            f"{name} has no gradient to student_logp: make its value by torch operations, without detach, "
            "no_grad, item or numpy"
        )
    finite_R = torch.stack([g.reshape(len(value_R), -1).isfinite().all(-1) for g in given]).all(0)
    if not bool((finite_R | ~value_R.isfinite()).all()):
        raise UserError(
            f"{name} has a gradient that is not finite where its value is: keep away from points without a "
            "slope, such as the root of 0 where both sides agree"
        )
