"""Weights that keep their file's dtype, mapped from it, until the model is sharded: cast at once, a whole one
in the asked dtype would pass through each process's memory.

    load     `stored_dtype` says what the file holds, and the model `waits` for the asked dtype
    adapt    `as_if_cast`: an adapter begins in the dtype of the weights that it stands beside
    shard    `cast` one layer after the other, of which this process then keeps its rows
"""

import contextlib
from collections.abc import Iterator
from itertools import chain
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from onpath.engines.head import unwrapped

Model = TypeVar("Model", bound=nn.Module)

_HALF = {"BF16": "bfloat16", "F16": "float16"}
"""safetensors' names, and torch's."""
_DTYPES = (torch.bfloat16, torch.float16)
_INDEX = "model.safetensors.index.json"


def stored_dtype(where: str) -> str | None:
    """In which half precision all of a model's weights are stored; None: they are not, or not in one.

    Args:
        where: a directory, or a model of the hub, which is downloaded if it is not here yet.
    """
    files = [_file(where, "model.safetensors")]
    if files[0] is None and (index := _file(where, _INDEX)) is not None:
        files, _ = get_checkpoint_shard_files(where, index)
    found = set()
    for path in filter(None, files):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return _HALF.get(found.pop()) if len(found) == 1 else None


def _file(where: str, name: str) -> str | None:
    return cached_file(where, name, _raise_exceptions_for_missing_entries=False)


def wait(model: nn.Module, dtype: torch.dtype) -> None:
    """Its weights will be of this dtype, as its config says from now on."""
    inner = unwrapped(model)
    inner.onpath_waits = dtype  # type: ignore[assignment]  # modules hold whatever one gives them
    for config in (inner.config, inner.config.get_text_config()):
        config.dtype = dtype


def waits(model: nn.Module) -> torch.dtype | None:
    """The dtype that a model's weights will have; None: they have it."""
    found: torch.dtype | None = getattr(unwrapped(model), "onpath_waits", None)
    return found


def cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Gives what a module holds in half precision the dtype that its model waits for, in place."""
    for tensor in chain(module.parameters(), module.buffers()) if dtype is not None else ():
        if tensor.dtype in _DTYPES:
            tensor.data = tensor.data.to(dtype)


def whole(model: Model) -> Model:
    """The model itself, all of it cast: one that is not sharded."""
    cast(model, waits(model))
    return model


@contextlib.contextmanager
def as_if_cast(model: nn.Module) -> Iterator[None]:
    """In this block weights that wait are of the dtype that they will have, and hold nothing."""
    dtype = waits(model)
    waiting = [] if dtype is None else [(p, p.data) for p in model.parameters() if p.dtype in _DTYPES]
    for weight, data in waiting:
        weight.data = torch.empty((), dtype=dtype).expand(data.shape)
    try:
        yield
    finally:
        for weight, data in waiting:
            weight.data = data
