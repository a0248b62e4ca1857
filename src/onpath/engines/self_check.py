"""The start-up check: what is generated, scored and trained on is the model that transformers has.

Three ways to the same log-probs: token by token with a cache, in one padded batch, and the pass that trains.
Each is compared with the model's own forward pass over one row at a time, without padding or cache. A few
tokens tell: rows of unequal length, a row that ends early, a sliding window that is crossed if it is short.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from onpath.data.batch import Batch, collate
from onpath.engines.head import (
    check_head,
    evaluating,
    foreign,
    head_of,
    hidden_states,
    is_quantised,
    own_logprobs,
    unwrapped,
)
from onpath.engines.hf import HFEngine
from onpath.engines.models import context_length
from onpath.engines.sharding import full, local, own_rows
from onpath.losses import TeacherHidden, token_stats
from onpath.records import Completion, Sampling, Trajectory
from onpath.system.errors import UserError

_LENGTHS = (9, 5, 2)
_NEW = 8  # tokens that are generated
_WINDOW = 128  # the longest sliding window that is crossed: it takes a prefix of its length
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention", "sliding_window_size")
_GAP = {False: 1e-3, True: 0.15}  # half precision or not → mean gap of log-probs, nats
_SELF_KL = {False: 1e-5, True: 1e-2}  # and mean KL of the model to itself, nats
_PADDING = "in a padded batch a row depends on the rows beside it"
_HALVES = "its decoder and its output layer, read apart, are not the whole model"
_MOVED = 0.02  # standard deviation of what an adapter's matrices of zeros are moved by


class Disagreement(UserError):
    """A model that onpath would read, sample or train otherwise than transformers does."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Mean distances from the model's own forward pass, over the tokens that were looked at."""

    tokens: int
    scored_gap_nats: float
    """Of log-probs in a padded batch."""
    generated_gap_nats: float | None
    """Of log-probs that came with samples; None: this model generates nothing in this process."""
    self_kl_nats: float | None
    """KL of the pass that trains to the pass that scores; None: dropout is asked for."""


def check_model(
    model: nn.Module,
    engine: HFEngine | None,
    *,
    key: str,
    vocabulary: int,
    bf16: bool = False,
    dropout: bool = False,
) -> Agreement:
    """Compares all that is made of a model with the model itself. Weights are left as they are, bit for bit.

    Args:
        model: with its adapter, if it has one: it is moved off zero, and put back.
        engine: generates from `model`; None: nothing does.
        key: names the model in errors.
        vocabulary: number of real ids.
        bf16: passes run under autocast.
        dropout: the pass that trains has noise, so it is not compared.

    Raises:
        Disagreement: what differs, by how much, and where it comes from.
        UserError: what the model cannot do at all.
    """
    inner = unwrapped(model)
    half = bf16 or next(inner.parameters()).dtype not in (torch.float32, torch.float64)
    half |= is_quantised(inner)  # whose kernels may compute in half precision whatever the dtype around them
    with _moved(model), foreign(inner, key):
        check_head(model, key)
        prefixes = _prefixes(inner.config, vocabulary)
        done = _generated(engine, prefixes) if engine else []
        responses = [c.ids for c in done] or [p[:_NEW] for p in prefixes]
        batch = _batch(prefixes, responses, next(inner.parameters()).device)
        own = _own_logps(model, batch, vocabulary)
        scored = _mean_gap(_scored(model, batch, vocabulary, bf16), own)
        if not scored <= _GAP[half]:
            alone = [collate([t], device=batch.token_N.device) for t in batch.trajectories]
            apart = torch.cat([_scored(model, row, vocabulary, bf16) for row in alone])
            cause = _PADDING if _mean_gap(apart, own) <= _GAP[half] else _HALVES
            raise Disagreement(_sentence(inner, key, "log-probs", scored, cause))
        generated = None
        if engine:
            generated = _mean_gap(torch.tensor([p for c in done for p in c.logprobs]), own)
            if not generated <= _GAP[half]:
                cause = _why_generated(model, engine, prefixes, vocabulary, half)
                raise Disagreement(_sentence(inner, key, "samples' log-probs", generated, cause))
        distance = None if dropout else _self_kl(model, batch, vocabulary, bf16)
        if distance is not None and not distance <= _SELF_KL[half]:
            cause = "two passes over the same tokens differ: something in it is random"
            raise Disagreement(_sentence(inner, key, "training pass", distance, cause))
    return Agreement(
        tokens=len(own), scored_gap_nats=scored, generated_gap_nats=generated, self_kl_nats=distance
    )


def _sentence(model: Any, key: str, what: str, gap: float, cause: str) -> str:
    return (
        f"{key}: onpath would be wrong for this {model.config.model_type} model: its {what} would be "
        f"{gap:.2g} nats a token from the model's own forward pass ({cause}); use another model family"
    )


def _prefixes(config: Any, vocabulary: int) -> list[tuple[int, ...]]:
    """Rows of unequal length; if there is a short window, one ends before it and one behind it."""
    room = context_length(config) - _NEW
    text: Mapping[str, Any] = config.get_text_config().to_dict()
    windows = [n for n in (text.get(name) for name in _WINDOWS) if isinstance(n, int) and 0 < n <= _WINDOW]
    lengths = (*_LENGTHS, *(n + d for n in sorted({*windows}) for d in (-3, 3)))
    return [
        tuple((7 * i + 3 + 5 * row) % vocabulary for i in range(max(1, min(length, room))))
        for row, length in enumerate(lengths)
    ]


def _generated(engine: HFEngine, prefixes: Sequence[tuple[int, ...]]) -> list[Completion]:
    """A few tokens after each prefix; one row ends after two, so that the cache must drop it."""

    def after(stop: int, limit: int) -> list[Completion]:
        sampling = Sampling(max_new_tokens=limit)
        return engine.ending_at({stop}).continue_from(prefixes, sampling)

    return after(after(-1, 2)[0].ids[-1], _NEW)


def _batch(
    prefixes: Sequence[tuple[int, ...]], responses: Sequence[tuple[int, ...]], device: torch.device
) -> Batch:
    rows = [
        Trajectory(student_context=p, teacher_context=p, response=r)
        for p, r in zip(prefixes, responses, strict=True)
    ]
    return collate(rows, device=device)


def _own_logps(model: nn.Module, batch: Batch, vocabulary: int) -> Tensor:
    """Of the response tokens [N], by the model's own forward pass over one row at a time."""
    rows = [(t.student_context + t.response, len(t.response)) for t in batch.trajectories]
    return torch.cat([own_logprobs(model, ids, vocabulary)[-length:] for ids, length in rows]).cpu()


def _states(model: nn.Module, batch: Batch, bf16: bool) -> Tensor:
    with torch.autocast(batch.token_N.device.type, torch.bfloat16, enabled=bf16):
        return batch.at_student(hidden_states(model, batch.student_ids_BS))


def _scored(model: nn.Module, batch: Batch, vocabulary: int, bf16: bool) -> Tensor:
    with evaluating(model), torch.no_grad():
        hidden_NH, head = _states(model, batch, bf16), head_of(model, vocabulary)
        stats = token_stats(
            student_hidden=hidden_NH, student_head=head, teacher=None, sampled_ids=batch.token_N
        )
    assert stats.student_logp is not None
    return stats.student_logp.cpu()


def _self_kl(model: nn.Module, batch: Batch, vocabulary: int, bf16: bool) -> float:
    """Mean KL of the pass that trains, with its graph, to the pass that scores."""
    with evaluating(model):
        with torch.no_grad():
            scoring_NH, head = _states(model, batch, bf16), head_of(model, vocabulary)
        training_NH = _states(model, batch, bf16).detach()
    teacher = TeacherHidden(hidden=scoring_NH, head=head)
    kl_N = token_stats(student_hidden=training_NH, student_head=head, teacher=teacher).reverse_kl
    assert kl_N is not None
    return float(kl_N.mean())


def _why_generated(
    model: nn.Module, engine: HFEngine, prefixes: Sequence[tuple[int, ...]], vocabulary: int, half: bool
) -> str:
    """Each row alone has no padding, and none of one token has a cache."""
    never = engine.ending_at({-1})
    device = next(unwrapped(model).parameters()).device

    def gap(limit: int) -> float:
        done = [never.continue_from([p], Sampling(max_new_tokens=limit))[0] for p in prefixes]
        own = _own_logps(model, _batch(prefixes, [c.ids for c in done], device), vocabulary)
        return _mean_gap(torch.tensor([p for c in done for p in c.logprobs]), own)

    if gap(1) > _GAP[half]:
        return "even the first token's"
    if gap(_NEW) > _GAP[half]:
        return "its cache does not hold what its next token depends on"
    return _PADDING


def _mean_gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().mean())


@contextlib.contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """With an adapter that does something: a new one is all zeros, and hides whatever it breaks."""
    zeros = [] if not isinstance(model, PeftModel) else [
        p for m in model.modules() if isinstance(m, LoraLayer) for p in m.parameters()
        if p.requires_grad and not bool(full(p.detach()).any())
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in zeros:
            local(p).copy_(own_rows(p, torch.randn(p.shape, generator=generator) * _MOVED))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
