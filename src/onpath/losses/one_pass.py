"""One pass over tokens and vocabulary: logits by chunk, statistics, value, and gradients formed on the spot.

    for each chunk of C rows:      logits of both sides into two [C, V] buffers            (two products)
                                   (a mixture of teachers: a third, and a product for each)
        for each block of R rows:  softmax, statistics, value; ∂/∂z replaces the student's logits
        grad_hidden = G·W,   grad_head += Gᵀ·h                                              (two products)

A row's weight never touches [C, V]: it scales the [C, H] side of both products.

Shape suffixes: N tokens, C rows of a chunk, R rows of a block, V vocabulary, H hidden, g guided rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from onpath.losses import head as heads
from onpath.losses import rows
from onpath.losses.guided import Guided, guided_rows
from onpath.losses.head import Head, WeightGradient
from onpath.losses.interface import (
    SparseGuidance,
    StatsRequest,
    TeacherMixture,
    TeacherScores,
    TeacherTopK,
    TokenStats,
    in_process,
)
from onpath.losses.objective import Objective

_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}  # of one [C, V] buffer
_BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}  # of one [R, V] buffer: on a CPU what the cache holds


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that one pass reads. Per-token tensors have N entries."""

    student_hidden: Tensor
    student_head: Head
    teacher: TeacherScores | None
    objective: Objective | None
    weights: Tensor | None
    """Of the weighted sum, denominator included; None: ones."""
    request: StatsRequest
    sampled_ids: Tensor | None = None
    behaviour_logp: Tensor | None = None
    advantage: Tensor | None = None
    sequence_ids: Tensor | None = None
    """Which response each token belongs to; read before the pass, for `advantage`."""
    guidance: SparseGuidance | None = None
    grad_hidden: bool = False
    grad_weight: bool = False
    grad_bias: bool = False
    chunk_rows: int | None = None

    @property
    def any_grad(self) -> bool:
        return self.grad_hidden or self.grad_weight or self.grad_bias


@dataclass(kw_only=True)
class Gradients:
    """In the working dtype; None: not wanted."""

    hidden: Tensor | None = None
    weight: WeightGradient | None = None
    bias: Tensor | None = None


@dataclass(kw_only=True)
class Outcome:
    """Sums of one pass, per-token values, gradients of the two sums together."""

    values: Tensor  # [N] of the objective, clipped
    objective_sum: Tensor
    guidance_sum: Tensor
    gradients: Gradients
    stats: dict[str, Tensor] = field(default_factory=dict)

    def token_stats(self) -> TokenStats:
        return TokenStats(loss=self.values, **self.stats)


@dataclass(kw_only=True)
class _Buffers:
    student: Tensor  # [C, V]
    teacher: Tensor | None  # [C, V]
    member: Tensor | None  # [C, V]: of a mixture the one that is being added
    scratch: tuple[Tensor, ...]  # [R, V] each


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Consecutive tokens, with the memory that they are worked on in."""

    here: slice  # of all tokens
    student: Tensor  # [C, V]: logits; after its blocks ∂/∂z, row by row still without its weight
    teacher: Tensor | None  # [C, V]
    scratch: tuple[Tensor, ...]  # [R, V] each
    masked: bool
    some_dead: bool  # whether the weight of a row can be 0
    guided: Guided | None
    ends: Tensor | None  # [E]: ids that are one outcome


@torch.no_grad()
def run(inputs: Inputs) -> Outcome:
    """The whole pass. No autograd graph is made or needed."""
    # Autocast decides the dtype of the weights' copies, and so of the products. Left on it would also round
    # what is summed over the vocabulary.
    weights = _cut_weights(inputs)
    with torch.autocast(inputs.student_hidden.device.type, enabled=False):
        return _run(inputs, *weights)


def _run(inputs: Inputs, student_VH: Tensor, teachers_VH: tuple[Tensor, ...]) -> Outcome:
    count, vocabulary = inputs.student_hidden.shape[0], inputs.student_head.vocabulary
    inputs, ends_E = _with_ends(inputs)
    dtype = heads.working_dtype(inputs.student_hidden, inputs.student_head.weight)
    like = inputs.student_hidden.new_empty((), dtype=dtype)
    chunk, block = chunk_sizes(inputs, vocabulary, dtype)
    weights_N = like.new_ones(count) if inputs.weights is None else inputs.weights.to(dtype)
    gradients = _allocate(inputs, like)
    outcome = Outcome(
        values=like.new_zeros(count),
        objective_sum=like.new_zeros(()),
        guidance_sum=like.new_zeros(()),
        gradients=gradients,
    )
    if count == 0:
        names = ["student_entropy"]
        if inputs.teacher is not None:
            names += ["reverse_kl", "forward_kl", "teacher_entropy"]
        if inputs.sampled_ids is not None:
            names += ["student_logp"] + ["teacher_logp"] * (inputs.teacher is not None)
        outcome.stats = {name: like.new_zeros(0) for name in names}
        return outcome
    buffers = _buffers(inputs, like, chunk, block)
    masked = inputs.student_head.masks() or any(t.head.masks() for t in in_process(inputs.teacher))
    # Once for all chunks, as each of these waits for the device: whether a row can have no weight, and at
    # which tokens there is guidance.
    clips = inputs.objective is not None and inputs.objective.token_clip is not None
    some_dead = clips or bool((weights_N == 0).any())
    guided_at = None if inputs.guidance is None else inputs.guidance.positions.cpu()
    for start in range(0, count, chunk):
        here = slice(start, min(start + chunk, count))
        size = here.stop - start
        # Every chunk is worked on in the same memory, so all that is wanted of it must be taken before the
        # next: its values and statistics by `_by_blocks`, its gradients by `_close_chunk`.
        student_CV = heads.logits_(
            inputs.student_head, student_VH, inputs.student_hidden[here], buffers.student[:size]
        )
        teacher_CV = _teacher_logits(inputs.teacher, teachers_VH, here, buffers)
        part = _Chunk(
            here=here,
            student=student_CV,
            teacher=teacher_CV,
            scratch=buffers.scratch,
            masked=masked,
            some_dead=some_dead,
            guided=guided_rows(inputs.guidance, guided_at, here, weights_N),
            ends=ends_E,
        )
        # The order is fixed: `_by_blocks` leaves ∂/∂z where the student's logits were, which `_close_chunk`
        # multiplies by the head.
        values_C = _by_blocks(inputs, part, outcome.stats)
        _close_chunk(inputs, outcome, part, values_C, weights_N[here], student_VH)
    return outcome


def _teacher_logits(
    teacher: TeacherScores | None, weights_VH: tuple[Tensor, ...], here: slice, buffers: _Buffers
) -> Tensor | None:
    """Logits [C, V] of a teacher in this process; of several log Σ_i w_i·p_i."""
    found_CV = None
    shares = teacher.weights if isinstance(teacher, TeacherMixture) else (1.0,) * len(weights_VH)
    for one, share, weight_VH in zip(in_process(teacher), shares, weights_VH, strict=True):
        buffer = buffers.teacher if found_CV is None else buffers.member
        assert buffer is not None
        logits_CV = heads.logits_(one.head, weight_VH, one.hidden[here], buffer[: here.stop - here.start])
        if len(weights_VH) > 1:
            for some_RV in logits_CV.split(len(buffers.scratch[0])):
                rows.log_softmax_(some_RV).add_(math.log(share))
        found_CV = logits_CV if found_CV is None else torch.logaddexp(found_CV, logits_CV, out=found_CV)
    return found_CV


def _with_ends(inputs: Inputs) -> tuple[Inputs, Tensor | None]:
    """The objective's ends as a tensor; a sampled one is the one outcome, which has the first one's id."""
    ends = inputs.objective.ends if inputs.objective is not None else ()
    if len(ends) < 2:
        return inputs, None
    ends_E = torch.tensor(ends, device=inputs.student_hidden.device)
    if inputs.sampled_ids is None:
        return inputs, ends_E
    is_end_N = torch.isin(inputs.sampled_ids, ends_E)
    return replace(inputs, sampled_ids=torch.where(is_end_N, ends[0], inputs.sampled_ids)), ends_E


def chunk_sizes(inputs: Inputs, vocabulary: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows per chunk and per block, by memory: many rows per product, few enough to stay small."""
    count, device = inputs.student_hidden.shape[0], inputs.student_hidden.device.type
    device = device if device in _CHUNK_BYTES else "cuda"
    row_bytes = vocabulary * dtype.itemsize
    chunk = inputs.chunk_rows or max(1, _CHUNK_BYTES[device] // row_bytes)
    if inputs.chunk_rows is None and chunk >= 64:
        chunk -= chunk % 32
    chunk = max(1, min(chunk, count))
    return chunk, max(1, min(chunk, _BLOCK_BYTES[device] // row_bytes))


def workspace(device: str, vocabulary: int, tokens: int, *, teachers: int) -> int:
    """Bytes of the buffers of a pass in float32, whatever the number of tokens beyond one chunk.

    Args:
        teachers: in this process, that score the same token.
    """
    row = 4 * vocabulary
    kind = device if device in _CHUNK_BYTES else "cuda"
    chunk = min(tokens * row, max(row, _CHUNK_BYTES[kind]))
    block = min(chunk, max(row, _BLOCK_BYTES[kind]))
    operand = chunk // 2 if kind == "cuda" else 0  # the gradient in half precision
    return chunk * (1 + min(teachers, 2)) + 4 * block + operand


def _allocate(inputs: Inputs, like: Tensor) -> Gradients:
    head, found = inputs.student_head, Gradients()
    if inputs.grad_hidden:
        found.hidden = like.new_zeros(inputs.student_hidden.shape)
    if inputs.grad_weight:
        found.weight = WeightGradient(head.weight, like.dtype)
    if inputs.grad_bias:
        assert head.bias is not None
        found.bias = like.new_zeros(head.bias.shape)
    return found


def _cut_weights(inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Weights of the student's head and of the teachers'; on a GPU they may be copies in half precision."""

    def cut(head: Head, hidden: Tensor) -> Tensor:
        weight_VH = head.weight.detach()[: head.vocabulary].to(hidden.device)  # a teacher's may be elsewhere
        wanted = heads.product_dtype(hidden, weight_VH)
        return weight_VH.to(wanted) if weight_VH.is_cuda else weight_VH

    teachers = tuple(cut(t.head, t.hidden) for t in in_process(inputs.teacher))
    return cut(inputs.student_head, inputs.student_hidden), teachers


def _buffers(inputs: Inputs, like: Tensor, chunk: int, block: int) -> _Buffers:
    vocabulary = inputs.student_head.vocabulary
    scratch = 4 if inputs.student_head.softcap is not None else 3
    teachers = len(in_process(inputs.teacher))
    return _Buffers(
        student=like.new_empty(chunk, vocabulary),
        teacher=like.new_empty(chunk, vocabulary) if teachers else None,
        member=like.new_empty(chunk, vocabulary) if teachers > 1 else None,
        scratch=tuple(like.new_empty(block, vocabulary) for _ in range(scratch)),
    )


def _by_blocks(inputs: Inputs, chunk: _Chunk, into: rows.Stats) -> Tensor:
    """Values [C] of a chunk; its statistics go `into` those of all tokens, ∂/∂z replaces its logits."""
    values_C, guided = chunk.student.new_zeros(len(chunk.student)), chunk.guided
    for block, at, slope_RV in _blocks(inputs, chunk):
        stats = rows.measure(block, inputs.request)
        all_at = slice(chunk.here.start + at.start, chunk.here.start + at.stop)
        _keep(stats, into, all_at, len(inputs.student_hidden))
        # Before `evaluate`, which writes over log p_S; `store` comes after it, as it writes over rows of the
        # teacher.
        if guided is not None:
            guided.add(block, at, slope_RV, gradient=inputs.any_grad)
        if inputs.objective is None:
            continue
        values_C[at] = rows.evaluate(block, inputs.objective, stats, gradient=inputs.any_grad)
        if block.shares is not None and chunk.ends is not None and inputs.any_grad:
            # ∂/∂z of the one outcome is every end's own, by its share; its own slope of soft-capping follows.
            grad_RV, ends_E = block.student_logp, chunk.ends
            grad_RV[:, ends_E] = grad_RV[:, ends_E[:1]] * block.shares
        if slope_RV is not None and inputs.any_grad:
            block.student_logp.mul_(slope_RV)
        if guided is not None:
            guided.store(chunk.teacher)
    return values_C


def _keep(found: rows.Stats, into: rows.Stats, at: slice, count: int) -> None:
    """In tensors for all `count` tokens: small ones that live on would keep the large ones between them from
    being given back."""
    for name, value in found.items():
        if name not in into:
            into[name] = value.new_empty(count, *value.shape[1:])
        into[name][at] = value


def _blocks(inputs: Inputs, chunk: _Chunk) -> Iterator[tuple[rows.Block, slice, Tensor | None]]:
    """Blocks with both sides normalised; with soft-capping also 1 − tanh², by which ∂/∂z becomes ∂/∂logit."""
    softcap, temperature = inputs.student_head.softcap, inputs.student_head.temperature
    count, block_rows = len(chunk.student), len(chunk.scratch[0])
    for start in range(0, count, block_rows):
        at = slice(start, min(start + block_rows, count))
        size, row = at.stop - start, slice(chunk.here.start + start, chunk.here.start + at.stop)
        scratch = [buffer[:size] for buffer in chunk.scratch]
        z_RV, slope_RV = chunk.student[at], None
        if softcap is not None:
            slope_RV = torch.mul(z_RV, temperature / softcap, out=scratch[3]).square_().neg_().add_(1.0)
        shares_RE = None
        if chunk.ends is not None:
            shares_RE = rows.merge_(z_RV, chunk.ends)
            if chunk.teacher is not None:
                rows.merge_(chunk.teacher[at], chunk.ends)
        yield (
            rows.Block(
                student_logp=rows.log_softmax_(z_RV),
                teacher_logp=None if chunk.teacher is None else rows.log_softmax_(chunk.teacher[at]),
                student_p=scratch[0],
                gap=scratch[1],
                teacher_p=scratch[2],
                masked=chunk.masked,
                sampled_ids=_cut(inputs.sampled_ids, row),
                served=_served(inputs.teacher, row),
                behaviour_logp=_cut(inputs.behaviour_logp, row),
                advantage=_cut(inputs.advantage, row),
                shares=shares_RE,
            ),
            at,
            slope_RV,
        )


def _cut(values_N: Tensor | None, row: slice) -> Tensor | None:
    return None if values_N is None else values_N[row]


def _served(teacher: TeacherScores | None, row: slice) -> TeacherTopK | None:
    if not isinstance(teacher, TeacherTopK):
        return None
    return TeacherTopK(
        ids=teacher.ids[row],
        logp=teacher.logp[row],
        sampled_logp=_cut(teacher.sampled_logp, row),
    )


def _close_chunk(
    inputs: Inputs, outcome: Outcome, chunk: _Chunk, values_C: Tensor, weights_C: Tensor, weight_VH: Tensor
) -> None:
    """Clips, weights, sums and the two gradient products of a chunk."""
    here, guided, grad_CV = chunk.here, chunk.guided, chunk.student
    live_C = weights_C != 0
    scale_C = weights_C
    objective = inputs.objective
    if objective is not None and objective.token_clip is not None:
        scale_C = torch.where(values_C > objective.token_clip, 0.0, weights_C)
        values_C = values_C.clamp(max=objective.token_clip)
    outcome.values[here] = values_C
    outcome.objective_sum += torch.where(live_C, weights_C * values_C, 0.0).sum()
    if guided is not None:
        products = guided.weights * torch.cat(guided.values)
        outcome.guidance_sum += torch.where(guided.weights != 0, products, 0.0).sum()
    if not inputs.any_grad:
        return
    if objective is None:
        grad_CV.zero_()
    if chunk.some_dead:
        grad_CV[scale_C == 0] = 0.0  # never 0 · inf; of the hidden states `_products` sees to it
    _products(inputs, outcome.gradients, chunk, scale_C, weight_VH)


def _products(inputs: Inputs, into: Gradients, chunk: _Chunk, scale_C: Tensor, weight_VH: Tensor) -> None:
    """Gradients of a chunk from ∂/∂z, row by row still without its weight."""
    here, guided, grad_CV = chunk.here, chunk.guided, chunk.student
    vocabulary, factor = weight_VH.shape[0], inputs.student_head.factor
    dead_C = scale_C == 0
    # Weights, denominator and dz/dlogit scale the narrow side of a product, [C, H], never [C, V].
    scale_C = scale_C * factor
    if guided is not None:
        guidance_gV = guided.gradient()
        guided_scale = guided.weights * factor
        # Set, not multiplied: 0 · inf would be nan, as for the rows of the objective in `_close_chunk`.
        guidance_gV[guided_scale == 0] = 0.0
        dead_C[guided.rows] &= guided_scale == 0
        # The two sums have weights of their own, so they can only be added with the weights inside. For
        # guided chunks alone [C, V] is touched once more, and 1 is left to scale by.
        grad_CV.mul_(scale_C[:, None])
        grad_CV.index_add_(0, guided.rows, guidance_gV.mul_(guided_scale[:, None]))
        scale_C = torch.ones_like(scale_C)
    operand_CV = grad_CV.to(weight_VH.dtype) if weight_VH.is_cuda else grad_CV
    if into.hidden is not None:
        grad_CH = heads.hidden_gradient(operand_CV, weight_VH)
        into.hidden[here] = grad_CH.mul_(scale_C[:, None])
    if into.weight is not None:
        scaled_CH = inputs.student_hidden[here].to(grad_CV.dtype) * scale_C[:, None]
        if chunk.some_dead:
            scaled_CH.masked_fill_(dead_C[:, None], 0.0)
        into.weight.add_(operand_CV, scaled_CH)
    if into.bias is not None:
        into.bias[:vocabulary] += scale_C @ grad_CV
