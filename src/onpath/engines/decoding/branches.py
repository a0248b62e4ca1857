"""Continuations of many places of the same responses, from the keys and values of one scoring pass.

A place is (row, length): go on after the first `length` tokens of a row. No prefix is read again and none is
copied per place: the places of one row are the columns of one query, and a mask lets each see its own prefix
and its own new tokens.

    keys of a row    prefix …………………………… | step 0: c columns | step 1: c columns | …
    column q sees    its first length − 1  | its own          | its own          | …

It starts by feeding the last token of the prefix once more, at its own position, for its logits. With drafts
(drafts.py) a step feeds some tokens of a column at once; keys of those that turn out wrong stay, unseen.
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
from onpath.engines.decoding.draw import draw
from onpath.engines.decoding.kv_cache import Stack, attends_plainly, picked, shared
from onpath.engines.head import unwrapped
from onpath.records import Completion, Sampling
from onpath.system.draws import noise

# B rows, C columns (places of a row), I tokens of a column fed at once, Q = C·I, R columns still writing,
# T keys so far, L new tokens, N places, V vocabulary.
_COMPACT_BELOW = 0.7  # drop finished rows once fewer than this share is still writing
_TWICE = 0.25  # share of rows that may come a second time, so that no row of few places waits for one of many
_QUERIES = 16_384  # rows × columns × tokens of one forward pass
_LOGITS = 2**27  # and times the vocabulary
_AHEAD = 8  # tokens that one pass checks, at most; drafts beyond a first mistake are wasted

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
        stack = Stack(unwrapped(model), rows=len(self.rows), length=longest)
        self.cache = stack.cache
        starts = accumulate((len(batch.trajectories) for batch in batches[:-1]), initial=0)
        self.parts = [stack.part(start) for start in starts]
        """Empty caches: each is for the pass over one batch."""

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
    engine: InProcess,
    past: Past,
    places: Sequence[Place],
    sampling: Sampling,
    *,
    keys: Sequence[str],
    drafts: Sequence[Drafts] | None = None,
) -> list[Completion]:
    """One completion per place, as `engine.continue_from` would write after the same ids.

    Args:
        drafts: one per row: what is probably written, checked several tokens at a time.
    """
    limit, count = sampling.max_new_tokens, len(places)
    uniform = np.zeros((count, limit))
    if sampling.temperature > 0 and count:
        uniform = np.stack([noise(sampling.seed, key, limit) for key in keys])
    paper = _Paper(
        uniform_NL=torch.from_numpy(uniform).to(engine.device),
        tokens_NL=torch.zeros(count, limit, dtype=torch.long, device=engine.device),
        logps_NL=torch.zeros(count, limit, device=engine.device),
        sampling=sampling,
        stops=torch.tensor(sorted(engine.stop_ids), device=engine.device),
    )
    was_training = engine.model.training
    engine.model.eval()
    try:
        queries = min(_QUERIES, _LOGITS // unwrapped(engine.model).config.vocab_size)
        for columns in _rounds(places, engine.device, max(1, queries // (1 if drafts is None else _AHEAD))):
            _write(engine, past, columns, paper, drafts)
    finally:
        engine.model.train(was_training)
    rows = zip(paper.tokens_NL.tolist(), paper.logps_NL.tolist(), strict=True)
    return [_completion(ids, logps, engine.stop_ids) for ids, logps in rows]


def _rounds(places: Sequence[Place], device: torch.device, queries: int) -> Iterator[_Columns]:
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
    """Columns by which the fewest are left empty, though few rows may come twice: their keys are copied.

    >>> _width([1, 1, 1, 1, 1, 1, 2])
    1
    >>> _width([90, 80, 100])
    100
    """

    def rows(width: int) -> int:
        return sum(-(-n // width) for n in counts)

    allowed = [w for w in {*counts} if rows(w) <= (1 + _TWICE) * len(counts)]
    return min(allowed, key=lambda w: (rows(w) * w, w), default=1)


@dataclass(frozen=True, kw_only=True)
class _Paper:
    """What is written, and the draws that decide it: one row per place."""

    uniform_NL: Tensor
    tokens_NL: Tensor
    logps_NL: Tensor
    sampling: Sampling
    stops: Tensor

    @property
    def ahead(self) -> int:
        """Tokens per pass: the fewest passes that a right draft needs, evenly."""
        limit = self.tokens_NL.shape[1]
        return -(-limit // -(-limit // _AHEAD))

    def add(self, index_R: Tensor, count_R: Tensor, fed_RI: Tensor, logits_RIV: Tensor) -> Tensor:
        """Draws after each token fed and writes the draws up to the first that was not fed next, or that ends
        the place's text: their number [R]. No token after a stop is part of it."""
        ahead = fed_RI.shape[1]
        at_RI = count_R[:, None] + torch.arange(ahead, device=fed_RI.device)
        inside_RI = at_RI.clamp(max=self.tokens_NL.shape[1] - 1)
        drawn_Q, logp_Q = draw(
            logits_RIV.flatten(0, 1), self.sampling, self.uniform_NL[index_R[:, None], inside_RI].flatten()
        )
        drawn_RI, logp_RI = drawn_Q.view_as(fed_RI), logp_Q.view_as(fed_RI)
        going_RI = (drawn_RI[:, :-1] == fed_RI[:, 1:]) & ~torch.isin(drawn_RI[:, :-1], self.stops)
        new_R = 1 + going_RI.long().cumprod(1).sum(1)
        new_R = torch.minimum(new_R, self.tokens_NL.shape[1] - count_R)
        kept_RI = torch.arange(ahead, device=fed_RI.device) < new_R[:, None]
        places = index_R[:, None].expand_as(at_RI)[kept_RI], at_RI[kept_RI]
        self.tokens_NL[places], self.logps_NL[places] = drawn_RI[kept_RI], logp_RI[kept_RI]
        return new_R


def _write(
    engine: InProcess,
    past: Past,
    columns: _Columns,
    paper: _Paper,
    drafts: Sequence[Drafts] | None,
) -> None:
    """One round, some tokens at a time."""
    index_BC, length_BC = columns.index_BC, columns.length_BC
    row_B = torch.tensor(columns.rows, device=engine.device)
    longest, limit = int(length_BC.max()), paper.sampling.max_new_tokens
    cache = shared(past.cache)
    if columns.rows != tuple(range(len(past.rows))):
        cache = picked(past.cache, row_B, longest - 1)
    last_BC, count_BC = _last_tokens(past, columns), torch.zeros_like(length_BC)
    seen_BCT = torch.arange(cache.get_seq_length(), device=engine.device) < (length_BC - 1)[..., None]
    own_CC = torch.eye(length_BC.shape[1], dtype=torch.bool, device=engine.device)
    writing_BC = index_BC >= 0
    while True:
        fed_BCI = last_BC[..., None]
        if drafts is not None:
            columns = _Columns(rows=tuple(row_B.tolist()), index_BC=index_BC, length_BC=length_BC)
            fed_BCI = torch.cat([fed_BCI, _drafted(columns, writing_BC, count_BC, paper, drafts)], dim=-1)
        ahead_I = torch.arange(fed_BCI.shape[-1], device=engine.device)
        before_II = ahead_I[:, None] >= ahead_I
        own_QQ = (own_CC[:, None, :, None] & before_II[:, None]).flatten(2).flatten(0, 1)
        mask_BQT = seen_BCT.repeat_interleave(len(ahead_I), dim=1)
        position_BCI = (length_BC - 1 + count_BC)[..., None] + ahead_I
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.bf16):
            logits_BQV = unwrapped(engine.model)(
                input_ids=fed_BCI.clamp(min=0).flatten(1),
                position_ids=position_BCI.clamp(max=longest + limit - 1).flatten(1),
                attention_mask=torch.cat([mask_BQT, own_QQ.expand(len(row_B), -1, -1)], dim=-1)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits
        logits_RIV = logits_BQV.unflatten(1, fed_BCI.shape[1:])[writing_BC][..., : engine.vocabulary]
        index_R = index_BC[writing_BC]
        new_R = paper.add(index_R, count_BC[writing_BC], fed_BCI[writing_BC], logits_RIV)
        new_BC = torch.zeros_like(count_BC).masked_scatter(writing_BC, new_R)
        right_BCI = ahead_I < new_BC[..., None]
        seen_BCT = torch.cat([seen_BCT, (own_CC[..., None] & right_BCI[:, None]).flatten(2)], dim=-1)
        count_BC = count_BC + new_BC
        last_R = paper.tokens_NL[index_R, count_BC[writing_BC] - 1]
        last_BC = torch.zeros_like(last_BC).masked_scatter(writing_BC, last_R)
        writing_BC = writing_BC & ~torch.isin(last_BC, paper.stops) & (count_BC < limit)
        keep_B = writing_BC.any(1)
        left = int(keep_B.sum())
        if left == 0:
            break
        if left < _COMPACT_BELOW * len(keep_B):
            cache.batch_select_indices(keep_B.nonzero().squeeze(-1))
            state = (row_B, index_BC, length_BC, last_BC, count_BC, seen_BCT, writing_BC)
            row_B, index_BC, length_BC, last_BC, count_BC, seen_BCT, writing_BC = (x[keep_B] for x in state)


def _drafted(
    columns: _Columns, writing_BC: Tensor, count_BC: Tensor, paper: _Paper, drafts: Sequence[Drafts]
) -> Tensor:
    """[B, C, I] of what may follow in each column; −1, which is never drawn, where there is no guess."""
    index, length, count = columns.index_BC.tolist(), columns.length_BC.tolist(), count_BC.tolist()
    written, room = paper.tokens_NL.tolist(), paper.tokens_NL.shape[1] - 1
    found: list[list[list[int]]] = []
    for b, writing in enumerate(writing_BC.tolist()):
        found.append([])
        for c, goes_on in enumerate(writing):
            guess: list[int] = []
            if goes_on:
                guess = drafts[columns.rows[b]].after(
                    length=length[b][c],
                    written=written[index[b][c]][: count[b][c]],
                    room=min(paper.ahead - 1, room - count[b][c]),
                )
            found[-1].append(guess)
    longest = max(len(guess) for row in found for guess in row)
    padded = [[[*guess, *[-1] * (longest - len(guess))] for guess in row] for row in found]
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
