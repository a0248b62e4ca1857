"""Both models decode side by side: the student generates a window of tokens, the teacher reads it in one
pass, and where it does not let a token pass it writes one of its own (speculative decoding, arXiv 2211.17192,
with another rule of acceptance: `methods/relay/method.py`).

    columns of both caches   prefix … | last  a_0 … a_{W−2} | last  a_0 … a_{W−2} | …
                                        └ of a window those up to its first rejected token stay visible

One mask serves both models: they are fed the same tokens in the same columns. Rejected keys stay in the
caches, masked; cutting them out would be a copy, of another length for each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onpath.engines.decoding.branches import InProcess, reads_otherwise
from onpath.engines.decoding.draw import check_finite, draw
from onpath.engines.decoding.kv_cache import preallocated_cache
from onpath.engines.head import head_of, logits_of, read, table_of, unwrapped
from onpath.records import Sampling
from onpath.system.draws import noise

# N active rows, P of them in which the teacher takes over, T columns so far, W tokens of a window, R all
# rows, L most new tokens, V vocabulary, H hidden.
_COMPACT_BELOW = 0.7  # drop finished rows once fewer than this share is active
_LOGITS = 2**27  # rows × window × vocabulary of one pass of the teacher
WINDOW = 4
"""Student's tokens that the teacher reads at once: more of them are wasted behind a rejected one."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A response that the student goes on with."""

    ids: tuple[int, ...]
    """Prompt and response so far, two tokens or more."""
    position: int
    """Tokens of the response so far."""
    room: int
    """Tokens that it may still get, one or more."""
    key: str
    """`<key> <position>` names the draws of the leg that starts there, `<key> <position>/draw` that of the
    teacher's token there."""
    first: str = ""
    """Names those of the first leg, if not so."""
    takeovers: int
    """Most tokens of the teacher's."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What was written after a start."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token under its writer, nats."""
    by_teacher: tuple[int, ...]
    """Indices of the teacher's tokens."""
    stopped: bool
    student_tokens: int
    """That the student generated, rejected ones and what followed them included."""
    read: Tensor | None = None
    """The teacher's hidden states that predict each token, [tokens, H], on its device: those that it scores
    with. None: it reads otherwise here than there (autocast)."""


def rows_at_once(student: InProcess, teacher: InProcess) -> int:
    """Rows of one call, by the memory of the teacher's logits."""
    vocabulary = max(len(table_of(engine.model)) for engine in (student, teacher))
    return max(1, _LOGITS // (WINDOW * vocabulary))


class _Reader:
    """One of the two models, its cache, and where it is."""

    def __init__(self, engine: InProcess, vocabulary: int | None) -> None:
        self.engine, self.cache = engine, preallocated_cache(unwrapped(engine.model))
        self.head = head_of(engine.model, vocabulary)
        self.autocast = reads_otherwise(engine)

    def __call__(self, ids_NQ: Tensor, positions_NQ: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [N, Q, H] on the model's device; the cache grows."""
        at = self.engine.device
        given = {"position_ids": positions_NQ.to(at), "attention_mask": mask.to(at), "use_cache": True}
        with self._as_it_generates():
            return read(self.engine.model, ids_NQ.to(at), past_key_values=self.cache, **given)

    def logits(self, hidden: Tensor, device: torch.device) -> Tensor:
        """[…, H] → […, V]."""
        with self._as_it_generates():
            return logits_of(self.head, hidden).to(device)

    def _as_it_generates(self) -> torch.autocast:
        return torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.autocast)


@dataclass(kw_only=True)
class _Rows:
    """The active rows."""

    row: Tensor  # [N], of R
    last: Tensor  # [N], the token that is fed next
    base: Tensor  # [N], its position when nothing is written yet
    room: Tensor  # [N]
    takeovers: Tensor  # [N], that are left
    count: Tensor  # [N], tokens written
    leg: Tensor  # [N], of them before the student's present leg
    visible: Tensor  # [N, T]

    def only(self, keep: Tensor) -> "_Rows":
        return _Rows(**{name: value[keep] for name, value in vars(self).items()})


@torch.inference_mode()
def side_by_side(
    student: InProcess,
    teacher: InProcess,
    starts: Sequence[Start],
    sampling: Sampling,
    *,
    delta: float,
    window: int = WINDOW,
) -> list[Finished]:
    """Each response to its end: a student's token with log p_S − log p_T > `delta` is replaced by one draw of
    the teacher's. The tokens do not depend on `window`, but for rounding of the logits.

    Args:
        sampling: untruncated, at temperature 1, for both models.
    """
    device, limit, seed = student.device, max(s.room for s in starts), sampling.seed
    readers = [_Reader(engine, student.vocabulary) for engine in (student, teacher)]
    stops = torch.tensor(sorted(student.stop_ids), device=device)
    rows = _prefilled(starts, readers, device)
    legs = [noise(seed, s.first or f"{s.key} {s.position}", limit) for s in starts]
    uniform_RL = torch.from_numpy(np.stack(legs)).to(device)
    # A window may reach beyond the limit; what it holds there is never counted.
    tokens_RL = torch.zeros(len(starts), limit + window, dtype=torch.long, device=device)
    logps_RL = torch.zeros(len(starts), limit + window, device=device)
    lengths, spent = [0] * len(starts), [0] * len(starts)
    places: list[list[int]] = [[] for _ in starts]
    states: list[list[Tensor]] = [[] for _ in starts]
    offset_W = torch.arange(window, device=device)
    while True:
        a_NW, ours_NW = _written(readers[0], rows, uniform_RL, sampling, window)
        fed_NW = torch.cat([rows.last[:, None], a_NW[:, :-1]], dim=1)
        read_NWH = _read(readers[1], rows, fed_NW)
        logp_NWV = readers[1].logits(read_NWH, device).log_softmax(-1)
        theirs_NW = logp_NWV.gather(-1, a_NW[..., None])[..., 0]
        # A window ends before its first token that does not pass, behind its first stop token, or at the
        # limit, whichever comes first. A stop token must pass too.
        rejected_N = _first((ours_NW - theirs_NW > delta) & (rows.takeovers > 0)[:, None])
        most_N = torch.minimum(_first(torch.isin(a_NW, stops)) + 1, rows.room - rows.count).clamp(max=window)
        takes_N = rejected_N < most_N
        new_N = torch.minimum(rejected_N, most_N)
        place_NW = rows.count[:, None] + offset_W
        inside_NW = offset_W < new_N[:, None]
        at = rows.row[:, None].expand_as(place_NW)[inside_NW], place_NW[inside_NW]
        told_NW = torch.where(theirs_NW.isnan(), theirs_NW, ours_NW)  # NaN rejects nothing
        tokens_RL[at], logps_RL[at] = a_NW[inside_NW], told_NW[inside_NW]
        # Fed were the last token of the text and the window but for its own last: of these the text now holds
        # those before the rejected one.
        rows.visible = torch.cat([rows.visible, offset_W <= new_N[:, None]], dim=1)
        rows.count = rows.count + new_N
        if taken := takes_N.nonzero()[:, 0].tolist():
            row_P, count_P = rows.row[taken], rows.count[taken]
            gone = list(zip(row_P.tolist(), count_P.tolist(), strict=True))
            points = [(starts[row].key, starts[row].position + count) for row, count in gone]
            once = np.concatenate([noise(seed, f"{key} {position}/draw", 1) for key, position in points])
            onward = np.stack([noise(seed, f"{key} {position + 1}", limit) for key, position in points])
            drawn = draw(logp_NWV[taken, new_N[taken]], sampling, torch.from_numpy(once).to(device))
            tokens_RL[row_P, count_P], logps_RL[row_P, count_P] = drawn
            uniform_RL[row_P] = torch.from_numpy(onward).to(device)
            for row, count in gone:
                places[row].append(count)
        for n, (row, new) in enumerate(torch.stack([rows.row, new_N + takes_N], 1).tolist()):
            states[row].append(read_NWH[n, :new])
        rows.count, rows.takeovers = rows.count + takes_N.long(), rows.takeovers - takes_N.long()
        rows.leg = torch.where(takes_N, rows.count, rows.leg)
        rows.last = tokens_RL[rows.row, rows.count - 1]
        for row, count in zip(rows.row.tolist(), rows.count.tolist(), strict=True):
            spent[row] += window * (lengths[row] < count)  # a finished row only waits
            lengths[row] = count
        goes_on_N = ~torch.isin(rows.last, stops) & (rows.count < rows.room)
        rows.room = torch.where(goes_on_N, rows.room, rows.count)
        left = int(goes_on_N.sum())
        if left == 0:
            break
        if left < _COMPACT_BELOW * len(goes_on_N):
            keep = goes_on_N.nonzero()[:, 0]
            for reader in readers:
                reader.cache.batch_select_indices(keep.to(reader.engine.device))
            rows = rows.only(keep)
    check_finite(logps_RL)
    ends = {int(i) for i in stops}
    found = []
    for row, n in enumerate(lengths):
        ids = tuple(tokens_RL[row, :n].tolist())
        found.append(
            Finished(
                ids=ids,
                logprobs=tuple(logps_RL[row, :n].tolist()),
                by_teacher=tuple(places[row]),
                stopped=ids[-1] in ends,
                student_tokens=spent[row],
                read=None if readers[1].autocast else torch.cat(states[row]),
            )
        )
    return found


def _prefilled(starts: Sequence[Start], readers: Sequence[_Reader], device: torch.device) -> _Rows:
    """Both caches hold all but the last token of each start, padded on the left, so that every row's first
    window begins in one column."""
    gaps = [max(len(s.ids) for s in starts) - len(s.ids) for s in starts]
    ids = [[*[0] * gap, *s.ids[:-1]] for gap, s in zip(gaps, starts, strict=True)]
    seen = [[False] * gap + [True] * (len(s.ids) - 1) for gap, s in zip(gaps, starts, strict=True)]
    ids_NT = torch.tensor(ids, dtype=torch.long, device=device)
    visible_NT = torch.tensor(seen, dtype=torch.bool, device=device)
    for reader in readers if ids_NT.numel() else ():
        reader(ids_NT, (visible_NT.long().cumsum(-1) - 1).clamp(min=0), visible_NT.long())
    nothing = torch.zeros(len(starts), dtype=torch.long, device=device)
    return _Rows(
        row=torch.arange(len(starts), device=device),
        last=torch.tensor([s.ids[-1] for s in starts], device=device),
        base=torch.tensor([len(s.ids) - 1 for s in starts], device=device),
        room=torch.tensor([s.room for s in starts], device=device),
        takeovers=torch.tensor([s.takeovers for s in starts], device=device),
        count=nothing,
        leg=nothing,
        visible=visible_NT,
    )


def _written(
    reader: _Reader, rows: _Rows, uniform_RL: Tensor, sampling: Sampling, window: int
) -> tuple[Tensor, Tensor]:
    """A window of the student's tokens [N, W] and their log-probs."""
    last, tokens, logps = rows.last, list[Tensor](), list[Tensor]()
    for i in range(window):
        own_N = torch.ones(len(last), i + 1, dtype=torch.bool, device=last.device)
        mask = torch.cat([rows.visible, own_N], dim=1)[:, None, None]
        hidden_NH = reader(last[:, None], _positions(rows, i)[:, None], mask)[:, -1]
        # Uniform number t of a leg is for its token t, whichever window holds that.
        at_N = (rows.count + i - rows.leg).clamp(max=uniform_RL.shape[1] - 1)
        logits_NV = reader.logits(hidden_NH, last.device)
        last, logp_N = draw(logits_NV, sampling, uniform_RL[rows.row, at_N])
        tokens.append(last)
        logps.append(logp_N)
    return torch.stack(tokens, 1), torch.stack(logps, 1)


def _read(reader: _Reader, rows: _Rows, fed_NW: Tensor) -> Tensor:
    """The teacher's hidden states [N, W, H] behind each token that is fed."""
    count, window = fed_NW.shape
    causal_WW = torch.ones(window, window, dtype=torch.bool, device=fed_NW.device).tril()
    parts = [rows.visible[:, None].expand(-1, window, -1), causal_WW.expand(count, -1, -1)]
    positions_NW = torch.stack([_positions(rows, i) for i in range(window)], 1)
    return reader(fed_NW, positions_NW, torch.cat(parts, dim=-1)[:, None])


def _positions(rows: _Rows, offset: int) -> Tensor:
    """[N]; beyond the end of a response, where what is drawn is thrown away, that of its end."""
    return rows.base + torch.minimum(rows.count + offset, rows.room)


def _first(marks_NW: Tensor) -> Tensor:
    """[N] index of the first mark in each row; W where there is none."""
    ahead_NW = marks_NW.long().cumsum(1) == 0
    return ahead_NW.long().sum(1)
