"""KV caches in preallocated memory: keys and values are stored where they stay.

`DynamicCache` copies all keys and values at every token. Here each layer's buffers are longer than what is in
them. Another cache may go on behind the end of this one in the same memory (a shared prefix), and the rows of
one cache may be filled by several passes.
"""

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from onpath.engines.head import evaluating, table_of
from onpath.system.errors import is_lack_of_memory

_GROW_MIN = 64  # tokens by which a full layer grows, at least


class _PreallocatedLayer(DynamicLayer):
    """`keys` and `values` are views of the filled part of larger buffers."""

    buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends; see `DynamicLayer.update`."""
        # The length is that of the view `keys`: caches over one memory append each where its own view ends.
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            self.grow(key_states, value_states, begin, end)
        assert self.buffers is not None
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        return self.set_length(end)

    def set_length(self, length: int) -> tuple[Tensor, Tensor]:
        """`keys` and `values` are the first `length` tokens of the buffers from now on."""
        assert self.buffers is not None
        keys, values = (buffer[:, :, :length] for buffer in self.buffers)
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        return keys, values

    def grow(self, key_states: Tensor, value_states: Tensor, begin: int, end: int) -> None:
        """Allocates for `end` tokens and more, and copies the first `begin`."""
        # By a quarter, so that n tokens cost O(log n) copies. The old memory is left as it is: another cache
        # may stand on it.
        size = end + max(_GROW_MIN, end // 4)
        grown = tuple(x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (key_states, value_states))
        if self.buffers is not None:
            for new, old in zip(grown, self.buffers, strict=True):
                new[:, :, :begin] = old[:, :, :begin]
        self.buffers = (grown[0], grown[1])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows, in memory of their own."""
        if self.buffers is None:
            return
        # Never in place: the memory may be another cache's prefix. Only what is filled is copied.
        length = self.get_seq_length()
        chosen = tuple(x.new_empty(len(indices), *x.shape[1:]) for x in self.buffers)
        for new, old in zip(chosen, self.buffers, strict=True):
            torch.index_select(old[:, :, :length], 0, indices, out=new[:, :, :length])
        self.buffers = (chosen[0], chosen[1])
        self.set_length(length)


class _LayerRows(_PreallocatedLayer):
    """Some rows of a layer of `StackedCache`, for one pass."""

    def __init__(self, whole: _PreallocatedLayer, start: int, stack: "StackedCache") -> None:
        super().__init__()
        self.whole, self.start, self.stack = whole, start, stack

    def grow(self, key_states: Tensor, value_states: Tensor, begin: int, end: int) -> None:
        """Its rows of the whole; what this pass is too short for is zero: masked, it must still be finite."""
        # The first pass allocates for all of them: only now are shapes and dtype known. The whole is as long
        # as the longest pass, so that what goes on behind it starts at one column in every row.
        rows, length = self.stack.rows, self.stack.length
        if self.whole.buffers is None:
            like = tuple(x[:1].expand(rows, -1, -1, -1) for x in (key_states, value_states))
            self.whole.grow(like[0], like[1], 0, length)
            self.whole.set_length(length)
        assert self.whole.buffers is not None
        keys, values = (x[self.start : self.start + len(key_states)] for x in self.whole.buffers)
        keys[:, :, end:length], values[:, :, end:length] = 0, 0
        self.buffers = (keys, values)


class StackedCache:
    """One cache for several forward passes, each of which fills some rows of it.

    Args:
        rows: of all passes.
        length: tokens of the longest.
    """

    def __init__(self, model: PreTrainedModel, *, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.cache = preallocated_cache(model)

    def part(self, start: int) -> DynamicCache:
        """An empty cache for the pass whose first row is `start`; it takes one call of the model."""
        part = DynamicCache()
        part.layers = [
            _LayerRows(layer, start, self)
            for layer in self.cache.layers
            if isinstance(layer, _PreallocatedLayer)
        ]
        return part


def preallocated_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own kind of cache; its layers of full attention preallocated."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def on_shared_prefix(cache: DynamicCache) -> DynamicCache:
    """A cache over the same memory, which goes on behind the end of the other; the other does not see it."""

    def again(layer: Any) -> Any:
        if not isinstance(layer, _PreallocatedLayer) or layer.buffers is None:
            return layer
        other = _PreallocatedLayer()
        other.buffers = layer.buffers
        other.set_length(layer.get_seq_length())
        return other

    mine = DynamicCache()
    mine.layers = [again(layer) for layer in cache.layers]
    return mine


def selected_rows(cache: DynamicCache, rows: Tensor, length: int) -> DynamicCache:
    """The first `length` tokens of some rows of a preallocated cache, in memory of their own."""
    mine = on_shared_prefix(cache)
    for layer in mine.layers:
        assert isinstance(layer, _PreallocatedLayer)
        layer.set_length(min(length, layer.get_seq_length()))
    mine.batch_select_indices(rows)
    return mine


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Only these rows, in every layer; recurrent states have but beam search's name for it."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.reorder_cache(rows)  # type: ignore[arg-type]
        elif isinstance(layer, DynamicLayer):
            layer.batch_select_indices(rows)


_TAKES_MASK: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def accepts_4d_mask(model: PreTrainedModel) -> bool:
    """Whether a finished [B, 1, Q, T] mask is taken as it is, together with positions of our own.

    Asked of the model itself, once: a mask that hides a token in the middle must give what is given without
    that token.
    """
    if model not in _TAKES_MASK:
        plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        known = inspect.signature(type(model).forward).parameters.keys() >= {"attention_mask", "position_ids"}
        _TAKES_MASK[model] = plain and known and _hides_a_token(model)
    return _TAKES_MASK[model]


@torch.inference_mode()
def _hides_a_token(model: PreTrainedModel) -> bool:
    weight = table_of(model)
    ids_1T = torch.arange(1, 6, device=weight.device)[None] % len(weight)
    kept_T = torch.tensor([0, 1, 3, 4], device=weight.device)
    mask_TT = torch.ones(5, 5, dtype=torch.bool, device=weight.device).tril()
    mask_TT[3:, 2] = False
    positions_1T = torch.tensor([[0, 1, 2, 2, 3]], device=weight.device)
    # A model that generates for a bf16 run has some weights in half precision for that while, and goes
    # through autocast; one in float32 must not, for its rounding would be taken for the mask's doing.
    dtypes = {p.dtype for p in model.parameters()}
    mixed = dtypes >= {torch.float32, torch.bfloat16}
    try:
        with evaluating(model), torch.autocast(weight.device.type, torch.bfloat16, enabled=mixed):
            found = model(input_ids=ids_1T, attention_mask=mask_TT[None, None], position_ids=positions_1T)
            expected = model(input_ids=ids_1T[:, kept_T])
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # ways to say no
        if is_lack_of_memory(error):
            raise
        return False
    logits_TV = expected.logits[0].float()
    gap_T = (found.logits[0, kept_T].float() - logits_TV).abs().amax(-1)
    rounding = 1e-3 if dtypes == {torch.float32} == {expected.logits.dtype} else 0.05
    return bool((gap_T <= rounding * logits_TV.abs().max()).all())
