"""A divergence per token from hidden states and heads, as an ordinary differentiable function.

For losses whose weights are not known before the forward pass: the gradient has to wait for them, so backward
computes the logits again, chunk by chunk (six products in all). The step itself uses `fused_objective`, which
needs four.

Shape suffixes: N tokens, H, G hidden widths of student and teacher, V vocabulary.
"""

from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from onpath.losses import one_pass
from onpath.losses.head import Head
from onpath.losses.interface import StatsRequest, TeacherHidden, check_shapes
from onpath.losses.objective import Divergence, Objective, OwnDivergence


def chunked_divergence(
    *,
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"] | Head,
    teacher_hidden: Float[Tensor, "N G"],
    teacher_head: Float[Tensor, "V G"] | Head,
    kind: Divergence | OwnDivergence,
    beta: float | None = None,
    entry_clip: float | None = None,
    chunk_rows: int | None = None,
) -> Float[Tensor, " N"]:
    """D(p_T, p_S) per token, nats; [N, V] is never held. See `onpath.divergence` for the three equations.

    Args:
        student_hidden, student_head: receive gradients; a head is a weight, or a `Head` with bias, scale,
            soft-cap.
        teacher_hidden, teacher_head: constants. The widths may differ, the vocabularies may not.
        kind: the divergence; `jensen_shannon` needs `beta`, the teacher's share of the mixture, in (0, 1). A
            function f(teacher_logp, student_logp) is one of your own.
        entry_clip: cap on each vocabulary entry's contribution, nats.
        chunk_rows: tokens per chunk; None chooses by memory.

    Raises:
        ValueError: shapes that do not fit, an unknown kind, a beta without jensen_shannon or outside (0, 1),
            a function that is no divergence.

    >>> h, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> both = {"student_hidden": h, "student_head": w, "teacher_hidden": h, "teacher_head": 2 * w}
    >>> round(chunked_divergence(**both, kind="reverse_kl").item(), 4)   # KL(softmax(1, 0) ‖ softmax(2, 0))
    0.0826
    """
    if isinstance(kind, str) and kind not in get_args(Divergence):
        raise ValueError(f"kind must be {', '.join(get_args(Divergence))} or a function, not {kind!r}")
    objective = Objective(kind=kind, beta=beta, entry_clip=entry_clip)
    head = student_head if isinstance(student_head, Head) else Head(weight=student_head)
    teacher = TeacherHidden(
        hidden=teacher_hidden.detach(),
        head=teacher_head if isinstance(teacher_head, Head) else Head(weight=teacher_head),
    )
    check_shapes(student_hidden, head, teacher, {})
    value: Tensor = _Recomputed.apply(
        student_hidden, head.weight, head.bias, head, teacher, objective, chunk_rows
    )
    return value


def _inputs(
    hidden: Tensor, head: Head, teacher: TeacherHidden, objective: Objective, rows: int | None, **more: Any
) -> Any:
    return one_pass.Inputs(
        student_hidden=hidden.detach(),
        student_head=head,
        teacher=teacher,
        objective=objective,
        request=StatsRequest(),
        chunk_rows=rows,
        **more,
    )


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher: TeacherHidden,
        objective: Objective,
        rows: int | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, teacher.hidden, teacher.head.weight, teacher.head.bias)
        ctx.rest = head, teacher, objective, rows
        return one_pass.run(_inputs(hidden, head, teacher, objective, rows, weights=None)).values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *_ = ctx.saved_tensors  # unpacking also checks that none was changed in place
        head, teacher, objective, rows = ctx.rest
        wanted = dict(zip(("grad_hidden", "grad_weight", "grad_bias"), ctx.needs_input_grad[:3], strict=True))
        found = one_pass.run(
            _inputs(hidden, head, teacher, objective, rows, weights=above_N, **wanted)
        ).gradients
        pairs = zip((found.hidden, found.weight, found.bias), (hidden, weight, bias), strict=True)
        return *(None if g is None else g.to(t.dtype) for g, t in pairs), None, None, None, None
