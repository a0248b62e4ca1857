"""The loss of a step: a weighted sum over tokens whose gradient is formed in the forward pass.

Weights and denominator are known before the pass, so nothing has to wait for backward and nothing is computed
twice: four matrix products over the vocabulary as in the plain loss, three with a frozen head, two without
gradients.

Shape suffixes: N tokens, H hidden, V vocabulary; S sequences, T longest of them.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from onpath.losses import one_pass
from onpath.losses.head import Head, working_dtype
from onpath.losses.interface import (
    LossResult,
    SparseGuidance,
    StatsRequest,
    TeacherScores,
    TeacherTopK,
    TokenStats,
    check_shapes,
    in_process,
)
from onpath.losses.objective import Objective


def fused_objective(
    *,
    student_hidden: Float[Tensor, "N H"],
    student_head: Head,
    teacher: TeacherScores | None,
    objective: Objective,
    weights: Float[Tensor, " N"],
    denominator: float | int | Float[Tensor, ""],
    sampled_ids: Int[Tensor, " N"] | None = None,
    behaviour_logp: Float[Tensor, " N"] | None = None,
    advantage: Float[Tensor, " N"] | None = None,
    sequence_ids: Int[Tensor, " N"] | None = None,
    guidance: SparseGuidance | None = None,
    stats: StatsRequest | None = None,
    chunk_rows: int | None = None,
) -> LossResult:
    """Σ_n w_n·D_n / denominator (+ guidance), never holding [N, V].

    Args:
        student_hidden: last hidden states of the student at the supervised tokens; receives a gradient.
        student_head: its weight and bias receive gradients if they require them.
        teacher: hidden states and head, or served top-k log-probs; None for objectives without a teacher.
        objective: D.
        weights: w per token. A token of weight 0 gives exactly zero value and gradient, whatever its logits
            are.
        denominator: the optimiser step's token count over all micro-batches and processes.
        sampled_ids: the response's tokens; needed by the objectives of the sampled token.
        behaviour_logp: log-probs under the policy that drew them, for `sampled`.
        advantage: replaces log p_T − log p_S in `sampled`.
        sequence_ids: which response each token belongs to, tokens in order; needed by `discount`, which then
            costs one more pass of two products, because a token's advantage depends on later chunks.
        guidance: sparse targets at some tokens, added to the same sum.
        stats: what to measure beside the loss.
        chunk_rows: tokens per chunk; None chooses by memory.

    Returns:
        The scalar to call `backward()` on (any factor of it stays right; a second backward raises), sums,
        statistics.

    Raises:
        ValueError: inputs that do not belong together, or an objective that this teacher cannot serve.
    """
    dtype = working_dtype(student_hidden, student_head.weight)
    if guidance is not None and guidance.weights is not None:
        guidance = replace(guidance, weights=guidance.weights.to(dtype) / denominator)
    tensors = (student_hidden, student_head.weight, student_head.bias)
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors]
    inputs = one_pass.Inputs(
        student_hidden=student_hidden.detach(),
        student_head=student_head,
        teacher=teacher,
        objective=objective,
        weights=(weights.to(dtype) / denominator).detach(),
        request=stats or StatsRequest(),
        sampled_ids=sampled_ids,
        behaviour_logp=behaviour_logp,
        advantage=advantage,
        sequence_ids=sequence_ids,
        guidance=guidance,
        grad_hidden=wanted[0],
        grad_weight=wanted[1],
        grad_bias=wanted[2],
        chunk_rows=chunk_rows,
    )
    _check(inputs, objective)
    if objective.discount and advantage is None:
        inputs = replace(inputs, advantage=_discounted_advantage(inputs, objective.discount))
    outcome = one_pass.run(inputs)
    total = outcome.objective_sum + outcome.guidance_sum
    if any(wanted):
        total = _Formed.apply(total, outcome.gradients, *tensors)
    return LossResult(
        loss=total,
        objective_sum=outcome.objective_sum,
        guidance_sum=outcome.guidance_sum,
        stats=outcome.token_stats(),
    )


def token_stats(
    *,
    student_hidden: Float[Tensor, "N H"],
    student_head: Head,
    teacher: TeacherScores | None,
    objective: Objective | None = None,
    sampled_ids: Int[Tensor, " N"] | None = None,
    stats: StatsRequest | None = None,
    chunk_rows: int | None = None,
) -> TokenStats:
    """The statistics of `fused_objective` without a gradient; `loss` is zero without an objective."""
    check_shapes(student_hidden, student_head, teacher, {"sampled_ids": sampled_ids})
    inputs = one_pass.Inputs(
        student_hidden=student_hidden.detach(),
        student_head=student_head,
        teacher=teacher,
        objective=objective,
        weights=None,
        request=stats or StatsRequest(),
        sampled_ids=sampled_ids,
        chunk_rows=chunk_rows,
    )
    return one_pass.run(inputs).token_stats()


def _check(inputs: one_pass.Inputs, objective: Objective) -> None:
    head, teacher, count = inputs.student_head, inputs.teacher, len(inputs.student_hidden)
    per_token = {
        "weights": inputs.weights,
        "sampled_ids": inputs.sampled_ids,
        "behaviour_logp": inputs.behaviour_logp,
        "advantage": inputs.advantage,
        "sequence_ids": inputs.sequence_ids,
    }
    check_shapes(inputs.student_hidden, head, teacher, per_token)
    if objective.needs_teacher and teacher is None:
        raise ValueError(f"{objective.name} needs a teacher")
    if not objective.is_divergence and inputs.sampled_ids is None:
        raise ValueError(f"{objective.name} needs sampled_ids, the response's tokens")
    if inputs.advantage is not None and objective.kind != "sampled":
        raise ValueError(f"advantage is of kind sampled; {objective.name} would not read it")
    if objective.ppo_clip is not None and inputs.behaviour_logp is None:
        raise ValueError(
            "ppo_clip compares with the policy that drew the tokens: without behaviour_logp it never clips"
        )
    if objective.ends and (inputs.guidance is not None or isinstance(teacher, TeacherTopK)):
        raise ValueError("ends as one outcome need both whole distributions, and no guidance beside them")
    if objective.ends and not 0 <= min(objective.ends) <= max(objective.ends) < head.vocabulary:
        raise ValueError(f"ends {objective.ends} are no ids of a vocabulary of {head.vocabulary}")
    if isinstance(teacher, TeacherTopK):
        _check_served(teacher, objective, head)
    for one in in_process(teacher):
        if one.head.temperature != head.temperature:
            raise ValueError(
                f"student at temperature {head.temperature:g} against teacher at "
                f"{one.head.temperature:g}: the loss would not be least where the models agree; use one "
                "temperature on both sides"
            )
    if inputs.guidance is not None and inputs.guidance.positions.numel():
        last = int(inputs.guidance.positions[-1])
        if not 0 <= last < count:
            raise ValueError(f"guidance at position {last} of {count} tokens")


def _check_served(teacher: TeacherTopK, objective: Objective, head: Head) -> None:
    if objective.teacher_temperature != 1.0:
        raise ValueError(
            "teacher_temperature needs the teacher's whole distribution to scale p_T^(1/τ) to mass 1, which "
            "a served teacher does not send: set it to 1, or use a teacher in this process"
        )
    if head.temperature != 1.0 and objective.needs_teacher:
        raise ValueError(
            f"served log-probs are at temperature 1, the student's head at {head.temperature:g}: set it to 1"
        )
    if objective.is_divergence and objective.support != "teacher_topk":
        raise ValueError(
            f"support {objective.support} needs the teacher's log-probs outside its own top k, which a "
            f"served teacher does not "
            "send: use support teacher_topk"
        )
    if objective.kind == "sampled" and teacher.sampled_logp is None:
        raise ValueError(
            "sampled needs the teacher's log-prob of every response token: TeacherTopK.sampled_logp is None"
        )


def _discounted_advantage(inputs: one_pass.Inputs, discount: float) -> Tensor:
    if inputs.sequence_ids is None:
        raise ValueError(
            "discount sums advantages along a response: sequence_ids must say which token belongs to which"
        )
    found = token_stats(
        student_hidden=inputs.student_hidden,
        student_head=inputs.student_head,
        teacher=inputs.teacher,
        sampled_ids=inputs.sampled_ids,
        chunk_rows=inputs.chunk_rows,
    )
    assert found.teacher_logp is not None
    assert found.student_logp is not None
    return discounted_future_sum(
        found.teacher_logp - found.student_logp, sequence_ids=inputs.sequence_ids, discount=discount
    )


def discounted_future_sum(
    values: Float[Tensor, " N"], *, sequence_ids: Int[Tensor, " N"], discount: float
) -> Float[Tensor, " N"]:
    """Σ_{u≥t} γ^{u−t}·value_u within each sequence; the tokens of one sequence stand together and in order.

    With values log p_T − log p_S of sampled tokens and γ = 1 this is the advantage of the whole trajectory's
    reverse KL.

    >>> values = torch.tensor([1.0, 2.0, 4.0])
    >>> discounted_future_sum(values, sequence_ids=torch.tensor([0, 0, 1]), discount=0.5).tolist()
    [2.0, 2.0, 4.0]
    """
    if not len(values):
        return values.clone()
    _, row_N, length_S = sequence_ids.unique_consecutive(return_inverse=True, return_counts=True)
    column_N = torch.arange(len(values), device=values.device) - (length_S.cumsum(0) - length_S)[row_N]
    padded_ST = values.new_zeros(len(length_S), int(length_S.max()))
    padded_ST[row_N, column_N] = values
    for t in range(padded_ST.shape[1] - 2, -1, -1):
        padded_ST[:, t] += discount * padded_ST[:, t + 1]
    return padded_ST[row_N, column_N]


class _Formed(torch.autograd.Function):
    """Hands over gradients that exist already, times whatever arrives from above."""

    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        gradients: one_pass.Gradients,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.gradients = [gradients.hidden, gradients.weight, gradients.bias]
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of fused_objective is formed once: call backward() on its loss only once"
            )
        found, ctx.gradients = ctx.gradients, None
        # On a GPU a look at the factor would wait for the device: a product costs less.
        if above.device.type != "cpu" or above.item() != 1.0:
            found = [None if g is None else g.mul_(above) for g in found]
        return None, None, *(None if g is None else g.to(d) for g, d in zip(found, ctx.dtypes, strict=True))
