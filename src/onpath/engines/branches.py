"""Continuations of many places of the same responses, from the keys and values of one scoring pass.

A place is (row, length): go on after the first `length` tokens of a row. No prefix is read again and none is
copied per place: the places of one row are the columns of one query, and a mask lets each see its own prefix
and its own new tokens.

    keys of a row    prefix …………………………… | step 0: c columns | step 1: c columns | …
    column q sees    its first length − 1  | its own          | its own          | …

It starts by feeding the last token of the prefix once more, at its own position, for its logits.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from onpath.engines.base import Completion
from onpath.engines.hf import HFEngine, attends_plainly, draw, noise, roomy_cache
from onpath.models import unwrapped
from onpath.records import Sampling

# B rows, C columns (places of a row), T tokens of the scoring pass, L new tokens, V vocabulary.
_COMPACT_BELOW = 0.85  # drop finished rows once fewer than this share is still writing
_QUERIES = 1024  # rows × columns of one forward pass: bounds its logits

Place = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a scoring pass over right-padded rows leaves."""

    cache: DynamicCache
    ids_BT: Tensor

    @staticmethod
    def possible(model: nn.Module) -> bool:
        """Plain full attention with a mask that we may set: else prefixes have to be read anew."""
        return attends_plainly(unwrapped(model))


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """The places of one forward pass: `index_BC` is their number in the request, −1 where a row has fewer."""

    rows: tuple[int, ...]
    index_BC: Tensor
    length_BC: Tensor


@torch.inference_mode()
def branch(
    engine: HFEngine,
    pasts: Sequence[Past],
    places: Sequence[Place],
    sampling: Sampling,
    *,
    keys: Sequence[str],
) -> list[Completion]:
    """One completion per place, as `engine.continue_from` would write after the same ids.

    Args:
        pasts: at least one. Their rows are counted through, in this order.
    """
    limit, count = sampling.max_new_tokens, len(places)
    uniform = np.stack([noise(sampling.seed, key, limit) for key in keys]) if keys else np.zeros((0, limit))
    uniform_NL = torch.from_numpy(uniform).to(engine.device)
    tokens_NL = torch.zeros(count, limit, dtype=torch.long, device=engine.device)
    logps_NL = torch.zeros(count, limit, device=engine.device)
    was_training = engine.model.training
    engine.model.eval()
    try:
        for columns in _rounds(places, engine.device):
            _write(engine, pasts, columns, sampling, uniform_NL, tokens_NL, logps_NL)
    finally:
        engine.model.train(was_training)
    rows = zip(tokens_NL.tolist(), logps_NL.tolist(), strict=True)
    return [_completion(ids, logps, engine.stop_ids) for ids, logps in rows]


def _rounds(places: Sequence[Place], device: torch.device) -> Iterator[_Columns]:
    by_row: dict[int, list[int]] = {}
    for i, (row, _) in enumerate(places):
        by_row.setdefault(row, []).append(i)
    width = max(1, _QUERIES // max(1, len(by_row)))
    for start in range(0, max(map(len, by_row.values()), default=0), width):
        parts = {row: mine[start : start + width] for row, mine in by_row.items() if len(mine) > start}
        widest = max(map(len, parts.values()))
        index = [[*mine, *[-1] * (widest - len(mine))] for mine in parts.values()]
        length = [[places[i][1] if i >= 0 else 1 for i in row] for row in index]
        yield _Columns(
            rows=tuple(parts),
            index_BC=torch.tensor(index, device=device),
            length_BC=torch.tensor(length, device=device),
        )


def _write(
    engine: HFEngine,
    pasts: Sequence[Past],
    columns: _Columns,
    sampling: Sampling,
    uniform_NL: Tensor,
    tokens_NL: Tensor,
    logps_NL: Tensor,
) -> None:
    """One round, token by token, into the rows of `tokens_NL` and `logps_NL`."""
    index_BC, length_BC = columns.index_BC, columns.length_BC
    cut = int(length_BC.max()) - 1
    cache = _merged(engine, pasts, columns.rows, cut)
    step_BC = _last_tokens(pasts, columns)
    mask_BCT = torch.arange(cut, device=step_BC.device) < (length_BC - 1)[..., None]
    own_CC = torch.eye(length_BC.shape[1], dtype=torch.bool, device=step_BC.device)
    stops = torch.tensor(sorted(engine.stop_ids), device=step_BC.device)
    writing_BC = index_BC >= 0
    for t in range(sampling.max_new_tokens):
        mask_BCT = torch.cat([mask_BCT, own_CC.expand(len(step_BC), -1, -1)], dim=-1)
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.bf16):
            logits_BCV = unwrapped(engine.model)(
                input_ids=step_BC,
                position_ids=length_BC - 1 + t,
                attention_mask=mask_BCT[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits
        index_R = index_BC[writing_BC]
        drawn_R, logp_R = draw(
            logits_BCV[writing_BC][:, : engine.vocabulary], sampling, uniform_NL[index_R, t]
        )
        tokens_NL[index_R, t], logps_NL[index_R, t] = drawn_R, logp_R
        step_BC = torch.zeros_like(step_BC).masked_scatter(writing_BC, drawn_R)
        writing_BC = writing_BC & ~torch.isin(step_BC, stops)
        keep_B = writing_BC.any(1)
        if not bool(keep_B.any()):
            break
        if int(keep_B.sum()) < _COMPACT_BELOW * len(keep_B):
            cache.batch_select_indices(keep_B.nonzero().squeeze(-1))
            index_BC, length_BC, step_BC = index_BC[keep_B], length_BC[keep_B], step_BC[keep_B]
            mask_BCT, writing_BC = mask_BCT[keep_B], writing_BC[keep_B]


def _merged(engine: HFEngine, pasts: Sequence[Past], rows: Sequence[int], cut: int) -> DynamicCache:
    """A new cache over the first `cut` tokens of some rows of all passes."""
    mine, starts = roomy_cache(unwrapped(engine.model)), _starts(pasts)
    chosen = [
        (into, p, [rows[i] - first for i in into])
        for p, (first, end) in enumerate(pairwise(starts))
        if (into := [i for i, row in enumerate(rows) if first <= row < end])
    ]
    whole = len(pasts) == 1 and list(rows) == list(range(len(pasts[0].ids_BT)))
    for depth in range(len(mine.layers)):
        both = []
        for name in ("keys", "values"):
            if whole:  # as they lie: the cache copies them
                both.append(getattr(pasts[0].cache.layers[depth], name)[:, :, :cut])
                continue
            like = getattr(pasts[0].cache.layers[depth], name)
            # Zeros: what a mask hides must still be finite.
            all_rows = like.new_zeros(len(rows), like.shape[1], cut, like.shape[3])
            for into, p, picked in chosen:
                part = getattr(pasts[p].cache.layers[depth], name)[picked, :, :cut]
                all_rows[into, :, : part.shape[2]] = part
            both.append(all_rows)
        mine.update(both[0], both[1], depth)
    return mine


def _starts(pasts: Sequence[Past]) -> list[int]:
    """Number of each pass's first row; rows are counted through all passes."""
    return [0, *accumulate(len(p.ids_BT) for p in pasts)]


def _last_tokens(pasts: Sequence[Past], columns: _Columns) -> Tensor:
    """Of each prefix: what the first step feeds."""
    starts = _starts(pasts)
    found = torch.zeros_like(columns.length_BC)
    for b, row in enumerate(columns.rows):
        p = bisect_right(starts, row) - 1
        found[b] = pasts[p].ids_BT[row - starts[p]][columns.length_BC[b] - 1]
    return found


def _completion(ids: list[int], logps: list[float], stop_ids: frozenset[int]) -> Completion:
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), None)
    size = len(ids) if end is None else end
    return Completion(
        ids=tuple(ids[:size]),
        logprobs=tuple(logps[:size]),
        finish_reason="length" if end is None else "stop",
    )
