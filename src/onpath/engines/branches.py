"""Continuations of many places of the same responses, from the keys and values of one scoring pass.

A place is (row, length): go on after the first `length` tokens of a row. No prefix is read again and none is
copied per place: the places of one row are the columns of one query, and a mask lets each see its own prefix
and its own new tokens.

    keys of a row    prefix …………………………… | step 0: c columns | step 1: c columns | …
    column q sees    its first length − 1  | its own          | its own          | …

It starts by feeding the last token of the prefix once more, at its own position, for its logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from onpath.engines.base import Completion
from onpath.engines.hf import HFEngine, draw, noise
from onpath.models import unwrapped
from onpath.records import Sampling

# B rows, C columns (places of a row), T tokens of the scoring pass, L new tokens, V vocabulary.
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
        config = unwrapped(model).config
        layers = DynamicCache(config=config).layers
        plain = all(type(layer) is DynamicLayer for layer in layers)
        return plain and config._attn_implementation == "sdpa" and not config.to_dict().get("alibi")


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """The places of one forward pass: `index_BC` is their number in the request, −1 where a row has fewer."""

    rows: tuple[int, ...]
    index_BC: Tensor
    length_BC: Tensor


@torch.inference_mode()
def branch(
    engine: HFEngine, past: Past, places: Sequence[Place], sampling: Sampling, *, keys: Sequence[str]
) -> list[Completion]:
    """One completion per place, as `engine.continue_from` would write after the same ids."""
    limit, count = sampling.max_new_tokens, len(places)
    uniform = np.stack([noise(sampling.seed, key, limit) for key in keys]) if keys else np.zeros((0, limit))
    uniform_NL = torch.from_numpy(uniform).to(past.ids_BT.device)
    tokens_NL = torch.zeros(count, limit, dtype=torch.long, device=past.ids_BT.device)
    logps_NL = torch.zeros(count, limit, device=past.ids_BT.device)
    was_training = engine.model.training
    engine.model.eval()
    for columns in _rounds(places, past.ids_BT.device):
        _write(engine, past, columns, sampling, uniform_NL, tokens_NL, logps_NL)
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
    past: Past,
    columns: _Columns,
    sampling: Sampling,
    uniform_NL: Tensor,
    tokens_NL: Tensor,
    logps_NL: Tensor,
) -> None:
    """One round, token by token, into the rows of `tokens_NL` and `logps_NL`."""
    real_BC = columns.index_BC >= 0
    index_R, length_BC = columns.index_BC[real_BC], columns.length_BC
    cut = int(length_BC.max()) - 1
    room = sampling.max_new_tokens * length_BC.shape[1]
    cache = _selected(past.cache, columns.rows, cut=cut, room=room, of=len(past.ids_BT))
    ids_BT = past.ids_BT[list(columns.rows)]
    step_BC = ids_BT.gather(1, length_BC - 1)
    prefix_BCT = torch.arange(cut, device=ids_BT.device) < (length_BC - 1)[..., None]
    own_CC = torch.eye(length_BC.shape[1], dtype=torch.bool, device=ids_BT.device)
    own_BCC = own_CC.expand(len(ids_BT), -1, -1)
    mask_BCT = prefix_BCT
    stops = torch.tensor(sorted(engine.stop_ids), device=ids_BT.device)
    writing_R = torch.ones(len(index_R), dtype=torch.bool, device=ids_BT.device)
    for t in range(sampling.max_new_tokens):
        mask_BCT = torch.cat([mask_BCT, own_BCC], dim=-1)
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.bf16):
            logits_BCV = unwrapped(engine.model)(
                input_ids=step_BC,
                position_ids=length_BC - 1 + t,
                attention_mask=mask_BCT[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits
        drawn_R, logp_R = draw(logits_BCV[real_BC][:, : engine.vocabulary], sampling, uniform_NL[index_R, t])
        tokens_NL[index_R, t], logps_NL[index_R, t] = drawn_R, logp_R
        writing_R = writing_R & ~torch.isin(drawn_R, stops)
        if not bool(writing_R.any()):
            break
        step_BC = torch.zeros_like(step_BC).masked_scatter(real_BC, drawn_R)


class _Roomy(DynamicLayer):
    """Keys and values with room for what comes: written in place, where a DynamicLayer copies all each time."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.size = keys.shape[-2]
        shape = (*keys.shape[:2], self.size + room, keys.shape[-1])
        self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, : self.size], self.values[:, :, : self.size] = keys, values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer.update`."""
        assert self.keys is not None
        assert self.values is not None
        end = self.size + key_states.shape[-2]
        self.keys[:, :, self.size : end], self.values[:, :, self.size : end] = key_states, value_states
        self.size = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """See `DynamicLayer.get_seq_length`."""
        return self.size


def _selected(cache: DynamicCache, rows: Sequence[int], *, cut: int, room: int, of: int) -> DynamicCache:
    """A cache over the first `cut` tokens of some of `of` rows; the one it comes from stays as it is."""
    chosen = slice(None) if list(rows) == list(range(of)) else list(rows)
    mine = DynamicCache()
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer), "Past.possible was asked"
        assert layer.keys is not None
        assert layer.values is not None
        mine.layers.append(_Roomy(layer.keys[chosen, :, :cut], layer.values[chosen, :, :cut], room))
    return mine


def _completion(ids: list[int], logps: list[float], stop_ids: frozenset[int]) -> Completion:
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), None)
    size = len(ids) if end is None else end
    return Completion(
        ids=tuple(ids[:size]),
        logprobs=tuple(logps[:size]),
        finish_reason="length" if end is None else "stop",
    )
