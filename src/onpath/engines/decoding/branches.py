"""Continuations of many prefixes of the same rows, from the KV cache of one scoring pass.

A place is (row, length): go on after the first `length` tokens of a row. No prefix is read again and none is
copied per place: the places of one row are the columns of one query, and a mask lets each attend to its own
prefix and its own new tokens.

    keys of a row          prefix …………………………… | step 0: c columns | step 1: c columns | …
    column q attends to    its first length − 1  | its own          | its own          | …

It starts by feeding the last token of the prefix once more, at its own position, for its logits. With drafts
(drafts.py) a step feeds some tokens of a column at once and verifies them (speculative decoding, arXiv
2211.17192); the keys of rejected tokens stay in the cache, masked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from onpath.data.batch import Batch
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.decoding.draw import check_finite, draw
from onpath.engines.decoding.kv_cache import StackedCache, accepts_4d_mask, on_shared_prefix, selected_rows
from onpath.engines.head import generating, head_of, logits_of, read, table_of, unwrapped
from onpath.records import Completion, Sampling
from onpath.system.draws import noise

# B rows, C columns (places of a row), I tokens of a column fed at once, Q = C·I, R active columns,
# T keys so far, L new tokens, N places, V vocabulary, H hidden.
_COMPACT_BELOW = 0.7  # drop finished rows once fewer than this share is active
_SPLIT_ROWS = 0.25  # share of rows that may be split, so that none with few places waits for one with many
_QUERIES = 16_384  # rows × columns × tokens of one forward pass
_LOGITS = 2**27  # and times the vocabulary
_TOKENS_PER_PASS = 8  # verified at once, at most: drafts behind a rejected one are wasted
_WORTH_DRAFTS = 2e7  # parameters: a pass over more of them costs on a CPU what its tokens cost, drafts or not

Place = tuple[int, int]


class InProcess(Protocol):
    """What is used of an engine over a model in this process."""

    model: nn.Module
    device: torch.device
    stop_ids: frozenset[int]
    vocabulary: int | None
    bf16: bool


class Past:
    """What the scoring passes over some batches leave: the keys and values of all their rows.

    Args:
        batches: their rows are counted through, in this order.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.rows = [t.teacher_context + t.response for batch in batches for t in batch.trajectories]
        longest = max(batch.teacher_ids_BT.shape[1] for batch in batches)
        stack = StackedCache(unwrapped(model), rows=len(self.rows), length=longest)
        self.cache = stack.cache
        starts = accumulate((len(batch.trajectories) for batch in batches[:-1]), initial=0)
        self.parts = [stack.part(start) for start in starts]
        """Empty caches: each is for the pass over one batch."""

    @staticmethod
    def possible(model: nn.Module) -> bool:
        """Plain full attention with a mask that we may set: else prefixes have to be read anew."""
        return accepts_4d_mask(unwrapped(model))


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """The places of one forward pass: `index_BC` is their number in the request, −1 where a row has fewer."""

    rows: tuple[int, ...]
    index_BC: Tensor
    length_BC: Tensor


@torch.inference_mode()
def branch(
    engine: InProcess,
    past: Past,
    places: Sequence[Place],
    sampling: Sampling,
    *,
    keys: Sequence[str],
    drafts: Sequence[Drafts] | None = None,
) -> list[Completion]:
    """One completion per place, as `engine.continue_from` would generate after the same ids.

    Args:
        drafts: one per row; several draft tokens are verified at a time.
    """
    limit, count = sampling.max_new_tokens, len(places)
    uniform = np.zeros((count, limit))
    if sampling.temperature > 0 and count:
        uniform = np.stack([noise(sampling.seed, key, limit) for key in keys])
    keeps = drafts is not None and any(d.keeps for d in drafts) and not reads_otherwise(engine)
    most = _TOKENS_PER_PASS if drafts is not None and _drafts_pay(engine) else 1
    generated = _Generated(
        tokens_per_pass=-(-limit // -(-limit // most)),  # the fewest passes that a right draft needs, filled
        states=[[] for _ in places] if keeps else None,
        uniform_NL=torch.from_numpy(uniform).to(engine.device),
        tokens_NL=torch.zeros(count, limit, dtype=torch.long, device=engine.device),
        logps_NL=torch.zeros(count, limit, device=engine.device),
        sampling=sampling,
        stops=torch.tensor(sorted(engine.stop_ids), device=engine.device),
    )
    queries = min(_QUERIES, _LOGITS // len(table_of(engine.model)))
    queries = max(1, queries // most)
    with generating(engine.model, bf16=engine.bf16):
        for columns in _batches(places, engine.device, queries):
            _generate(engine, past, columns, generated, drafts)
    check_finite(generated.logps_NL)
    if drafts is not None and generated.states is not None:
        for (row, _), states in zip(places, generated.states, strict=True):
            drafts[row].read = torch.cat(states) if drafts[row].keeps else None
    rows = zip(generated.tokens_NL.tolist(), generated.logps_NL.tolist(), strict=True)
    return [_completion(ids, logps, engine.stop_ids) for ids, logps in rows]


def _drafts_pay(engine: InProcess) -> bool:
    return engine.device.type != "cpu" or sum(p.numel() for p in engine.model.parameters()) < _WORTH_DRAFTS


def reads_otherwise(engine: InProcess) -> bool:
    """Whether it generates under autocast of weights that it scores with as they are."""
    return engine.bf16 and table_of(engine.model).dtype == torch.float32


def _batches(places: Sequence[Place], device: torch.device, queries: int) -> Iterator[_Columns]:
    by_row: dict[int, list[int]] = {}
    for i, (row, _) in sorted(enumerate(places), key=lambda place: place[1]):
        by_row.setdefault(row, []).append(i)
    width = min(_width([len(mine) for mine in by_row.values()]), queries)
    parts = [
        (row, mine[at : at + width]) for row, mine in by_row.items() for at in range(0, len(mine), width)
    ]
    together = max(1, queries // max(1, width))
    for start in range(0, len(parts), together):
        some = parts[start : start + together]
        widest = max(len(mine) for _, mine in some)
        index = [[*mine, *[-1] * (widest - len(mine))] for _, mine in some]
        length = [[places[i][1] if i >= 0 else 1 for i in row] for row in index]
        yield _Columns(
            rows=tuple(row for row, _ in some),
            index_BC=torch.tensor(index, device=device),
            length_BC=torch.tensor(length, device=device),
        )


def _width(counts: Sequence[int]) -> int:
    """Columns by which the fewest are left empty, though few rows may be split: their keys are copied.

    >>> _width([1, 1, 1, 1, 1, 1, 2])
    1
    >>> _width([90, 80, 100])
    100
    """

    def rows(width: int) -> int:
        return sum(-(-n // width) for n in counts)

    allowed = [w for w in {*counts} if rows(w) <= (1 + _SPLIT_ROWS) * len(counts)]
    return min(allowed, key=lambda w: (rows(w) * w, w), default=1)


@dataclass(frozen=True, kw_only=True)
class _Generated:
    """What is generated, and the uniform numbers that decide it: one row per place."""

    uniform_NL: Tensor
    tokens_NL: Tensor
    logps_NL: Tensor
    sampling: Sampling
    stops: Tensor
    tokens_per_pass: int
    """Fed at once, drafts included."""
    states: list[list[Tensor]] | None = None
    """The hidden states that predict the tokens, by place, pass after pass; None: they are not wanted."""

    def verify(
        self, index_R: Tensor, count_R: Tensor, fed_RI: Tensor, hidden_RIH: Tensor, logits_RIV: Tensor
    ) -> Tensor:
        """Samples after each token fed and accepts the samples up to the first that was not fed next, or that
        is a stop token: their number [R], at least 1."""
        fed = fed_RI.shape[1]
        # A position has one uniform number, whichever pass samples it: drafts change no sample. (Positions
        # past the limit borrow the last number; they are not accepted.)
        at_RI = count_R[:, None] + torch.arange(fed, device=fed_RI.device)
        inside_RI = at_RI.clamp(max=self.tokens_NL.shape[1] - 1)
        drawn_Q, logp_Q = draw(
            logits_RIV.flatten(0, 1), self.sampling, self.uniform_NL[index_R[:, None], inside_RI].flatten()
        )
        drawn_RI, logp_RI = drawn_Q.view_as(fed_RI), logp_Q.view_as(fed_RI)
        # Logits behind a token that was not sampled are worthless, however well later ones agree: hence the
        # product. One more is right than agree: the sample that disagrees itself.
        agrees_RI = (drawn_RI[:, :-1] == fed_RI[:, 1:]) & ~torch.isin(drawn_RI[:, :-1], self.stops)
        new_R = 1 + agrees_RI.long().cumprod(1).sum(1)
        new_R = torch.minimum(new_R, self.tokens_NL.shape[1] - count_R)
        kept_RI = torch.arange(fed, device=fed_RI.device) < new_R[:, None]
        places = index_R[:, None].expand_as(at_RI)[kept_RI], at_RI[kept_RI]
        self.tokens_NL[places], self.logps_NL[places] = drawn_RI[kept_RI], logp_RI[kept_RI]
        if self.states is not None:
            for place, states in zip(
                index_R.tolist(), hidden_RIH[kept_RI].split(new_R.tolist()), strict=True
            ):
                self.states[place].append(states)
        return new_R


def _generate(
    engine: InProcess,
    past: Past,
    columns: _Columns,
    generated: _Generated,
    drafts: Sequence[Drafts] | None,
) -> None:
    """One batch, some tokens a forward pass."""
    index_BC, length_BC = columns.index_BC, columns.length_BC
    head = head_of(engine.model, engine.vocabulary)
    row_B = torch.tensor(columns.rows, device=engine.device)
    longest, limit = int(length_BC.max()), generated.sampling.max_new_tokens
    # All rows need no copy: new keys go behind the prefixes, over those of an earlier batch.
    cache = on_shared_prefix(past.cache)
    if columns.rows != tuple(range(len(past.rows))):
        cache = selected_rows(past.cache, row_B, longest - 1)
    last_BC, count_BC = _last_tokens(past, columns), torch.zeros_like(length_BC)
    # Of the cached keys a column attends to its own prefix alone, less the last token, which is fed again.
    # Behind it stand the rest of the row's response, padding, and later the tokens of other columns.
    visible_BCT = torch.arange(cache.get_seq_length(), device=engine.device) < (length_BC - 1)[..., None]
    same_CC = torch.eye(length_BC.shape[1], dtype=torch.bool, device=engine.device)
    active_BC = index_BC >= 0
    while True:
        fed_BCI = last_BC[..., None]
        if drafts is not None:
            columns = _Columns(rows=tuple(row_B.tolist()), index_BC=index_BC, length_BC=length_BC)
            fed_BCI = torch.cat([fed_BCI, _proposed(columns, active_BC, count_BC, generated, drafts)], dim=-1)
        # Drafts attend to their column's earlier ones. The diagonal is set even for finished and empty
        # columns: a query without any key may give nan, which would reach other columns through its keys,
        # masked or not (0 · nan).
        offset_I = torch.arange(fed_BCI.shape[-1], device=engine.device)
        causal_II = offset_I[:, None] >= offset_I
        fed_QQ = (same_CC[:, None, :, None] & causal_II[:, None]).flatten(2).flatten(0, 1)
        mask_BQT = visible_BCT.repeat_interleave(len(offset_I), dim=1)
        # Where nothing is proposed (−1, finished columns) any id will do, at no position beyond the end of
        # the longest text.
        position_BCI = (length_BC - 1 + count_BC)[..., None] + offset_I
        # R counts the active columns row by row. Indexing by `active_BC` and `masked_scatter` agree on that
        # order, so `active_BC` may not change before the last of them.
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.bf16):
            hidden_BQH = read(
                engine.model,
                fed_BCI.clamp(min=0).flatten(1),
                position_ids=position_BCI.clamp(max=longest + limit - 1).flatten(1),
                attention_mask=torch.cat([mask_BQT, fed_QQ.expand(len(row_B), -1, -1)], dim=-1)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            hidden_RIH = hidden_BQH.unflatten(1, fed_BCI.shape[1:])[active_BC]
            logits_RIV = logits_of(head, hidden_RIH)
        index_R = index_BC[active_BC]
        new_R = generated.verify(index_R, count_BC[active_BC], fed_BCI[active_BC], hidden_RIH, logits_RIV)
        new_BC = torch.zeros_like(count_BC).masked_scatter(active_BC, new_R)
        # The first fed token was part of the text before; a draft is, if it was sampled. The keys of the rest
        # stay in the cache, masked: cutting them out would be a copy, of another length for each column.
        accepted_BCI = offset_I < new_BC[..., None]
        fed_BCT = (same_CC[..., None] & accepted_BCI[:, None]).flatten(2)
        visible_BCT = torch.cat([visible_BCT, fed_BCT], dim=-1)
        count_BC = count_BC + new_BC
        last_R = generated.tokens_NL[index_R, count_BC[active_BC] - 1]
        last_BC = torch.zeros_like(last_BC).masked_scatter(active_BC, last_R)
        active_BC = active_BC & ~torch.isin(last_BC, generated.stops) & (count_BC < limit)
        keep_B = active_BC.any(1)
        left = int(keep_B.sum())
        if left == 0:
            break
        if left < _COMPACT_BELOW * len(keep_B):
            cache.batch_select_indices(keep_B.nonzero().squeeze(-1))
            state = (row_B, index_BC, length_BC, last_BC, count_BC, visible_BCT, active_BC)
            row_B, index_BC, length_BC, last_BC, count_BC, visible_BCT, active_BC = (x[keep_B] for x in state)


def _proposed(
    columns: _Columns, active_BC: Tensor, count_BC: Tensor, generated: _Generated, drafts: Sequence[Drafts]
) -> Tensor:
    """Draft tokens [B, C, I] of each column; −1, which is never sampled, where there are none."""
    index, length, count = columns.index_BC.tolist(), columns.length_BC.tolist(), count_BC.tolist()
    tokens, limit = generated.tokens_NL.tolist(), generated.tokens_NL.shape[1]
    found: list[list[list[int]]] = []
    for b, active in enumerate(active_BC.tolist()):
        found.append([])
        for c, is_active in enumerate(active):
            draft: list[int] = []
            if is_active:
                draft = drafts[columns.rows[b]].propose(
                    prefix_length=length[b][c],
                    generated=tokens[index[b][c]][: count[b][c]],
                    max_tokens=min(generated.tokens_per_pass, limit - count[b][c]) - 1,
                )
            found[-1].append(draft)
    longest = max(len(draft) for row in found for draft in row)
    padded = [[[*draft, *[-1] * (longest - len(draft))] for draft in row] for row in found]
    return torch.tensor(padded, dtype=torch.long, device=count_BC.device).reshape(*count_BC.shape, longest)


def _last_tokens(past: Past, columns: _Columns) -> Tensor:
    """Of each prefix: what the first step feeds."""
    lengths = zip(columns.rows, columns.length_BC.tolist(), strict=True)
    return columns.length_BC.new_tensor([[past.rows[row][n - 1] for n in mine] for row, mine in lengths])


def _completion(ids: list[int], logps: list[float], stop_ids: frozenset[int]) -> Completion:
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), None)
    size = len(ids) if end is None else end
    return Completion(
        ids=tuple(ids[:size]),
        logprobs=tuple(logps[:size]),
        finish_reason="length" if end is None else "stop",
    )
