"""Key-value caches with room: what is appended is written where it stays.

`DynamicCache` copies all keys and values at every token. Here each layer's tensors have room for more.
Another cache may go on behind the end of this one in the same memory, and the rows of one cache may be filled
by several passes.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_ROOM_MIN = 64  # tokens for which a full layer grows, at least


class _Room(DynamicLayer):
    """`keys` and `values` are the used part of larger tensors."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends; see `DynamicLayer.update`."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            self.grow(key_states, value_states, begin, end)
        assert self.room is not None
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = new
        return self.use(end)

    def use(self, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` tokens are keys and values from now on."""
        assert self.room is not None
        keys, values = (room[:, :, :length] for room in self.room)
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        return keys, values

    def grow(self, key_states: Tensor, value_states: Tensor, begin: int, end: int) -> None:
        """Makes room for `end` tokens and more, and takes along the first `begin`."""
        size = end + max(_ROOM_MIN, end // 4)
        grown = tuple(x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (key_states, value_states))
        if self.room is not None:
            for new, old in zip(grown, self.room, strict=True):
                new[:, :, :begin] = old[:, :, :begin]
        self.room = (grown[0], grown[1])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows, in memory of their own."""
        if self.room is None:
            return
        length = self.get_seq_length()
        chosen = tuple(x.new_empty(len(indices), *x.shape[1:]) for x in self.room)
        for new, old in zip(chosen, self.room, strict=True):
            torch.index_select(old[:, :, :length], 0, indices, out=new[:, :, :length])
        self.room = (chosen[0], chosen[1])
        self.use(length)


class _Rows(_Room):
    """Some rows of a layer of `Stack`, for one pass."""

    def __init__(self, whole: _Room, start: int, stack: "Stack") -> None:
        super().__init__()
        self.whole, self.start, self.stack = whole, start, stack

    def grow(self, key_states: Tensor, value_states: Tensor, begin: int, end: int) -> None:
        """Its rows of the whole; what this pass is too short for is zero: hidden, it must still be finite."""
        rows, length = self.stack.rows, self.stack.length
        if self.whole.room is None:
            like = tuple(x[:1].expand(rows, -1, -1, -1) for x in (key_states, value_states))
            self.whole.grow(like[0], like[1], 0, length)
            self.whole.use(length)
        assert self.whole.room is not None
        keys, values = (x[self.start : self.start + len(key_states)] for x in self.whole.room)
        keys[:, :, end:length], values[:, :, end:length] = 0, 0
        self.room = (keys, values)


class Stack:
    """One cache for several passes, each of which fills some rows of it.

    Args:
        rows: of all passes.
        length: tokens of the longest.
    """

    def __init__(self, model: PreTrainedModel, *, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.cache = roomy_cache(model)

    def part(self, start: int) -> DynamicCache:
        """An empty cache for the pass whose first row is `start`; it takes one call of the model."""
        part = DynamicCache()
        part.layers = [_Rows(layer, start, self) for layer in self.cache.layers if isinstance(layer, _Room)]
        return part


def roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own kind of cache; its layers of plain attention with room."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_Room() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def shared(cache: DynamicCache) -> DynamicCache:
    """A roomy cache over the same memory; it goes on behind the end of the other, which does not see it."""

    def again(layer: Any) -> Any:
        if not isinstance(layer, _Room) or layer.room is None:
            return layer
        other = _Room()
        other.room = layer.room
        other.use(layer.get_seq_length())
        return other

    mine = DynamicCache()
    mine.layers = [again(layer) for layer in cache.layers]
    return mine


def picked(cache: DynamicCache, rows: Tensor, length: int) -> DynamicCache:
    """The first `length` tokens of some rows of a roomy cache, in memory of their own."""
    mine = shared(cache)
    for layer in mine.layers:
        assert isinstance(layer, _Room)
        layer.use(min(length, layer.get_seq_length()))
    mine.batch_select_indices(rows)
    return mine


def attends_plainly(model: PreTrainedModel) -> bool:
    """Full attention in every layer through torch's own kernel: it takes a mask that we have made."""
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    return plain and model.config._attn_implementation == "sdpa" and not model.config.to_dict().get("alibi")
