"""Model directories that somebody else made: looked at before anything in them is opened, and after loading.

Weights are read from safetensors alone, which cannot run code; a `.bin` is a pickle, which can.
"""

import re
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from onpath.system.errors import UserError
from onpath.system.reading import read_json
from onpath.system.text import one_line

FAILURES = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, AssertionError),
    *(ZeroDivisionError, OverflowError, MemoryError, ImportError, RecursionError, StrictDataclassError),
)
"""What libraries raise over a config.json with absurd or missing values."""
_INDEX = "model.safetensors.index.json"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_LARGEST = 2**24


def check_model(directory: Path, key: str) -> None:
    """What a directory says of itself must be true, and its weights safetensors beside it.

    Args:
        key: names the option in errors.

    Raises:
        UserError: they are not.
    """
    where = f"{key}: {directory}"
    config = directory / "config.json"
    if config.exists():
        told = read_json(config, keys={})
        for name in _SIZES:
            size, least = told.get(name), int(name != "num_hidden_layers")
            if size is None or isinstance(size, list):  # some families have a number per layer
                continue
            if type(size) is not int or not least <= size <= _LARGEST:
                raise UserError(
                    f"{where}: config.json: {name} is {one_line(repr(size), 40)}, which is no size"
                )
    if (directory / _INDEX).exists():
        _check_index(directory, where)
    elif config.exists():
        _check_pickles(directory, "model.safetensors", where)


def check_adapter(directory: Path, key: str) -> None:
    """Likewise of a peft adapter.

    Raises:
        UserError: it is none, or its weights are no safetensors.
    """
    read_json(directory / "adapter_config.json", keys={"peft_type": str})
    _check_pickles(directory, "adapter_model.safetensors", f"{key}: {directory}")
    if not (directory / "adapter_model.safetensors").is_file():
        raise UserError(f"{key}: {directory}: an adapter without adapter_model.safetensors")


def loaded_adapter(model: nn.Module, directory: str, key: str) -> Any:
    """The model with an adapter (see `check_adapter`) of whose tensors each was expected, is there, and has
    its shape.

    Raises:
        UserError: some are missing, or are another model's.
    """
    path = Path(directory) / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            given = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{key}: {path} is damaged: {one_line(str(error))}") from None
    with warnings.catch_warnings():  # peft's word for what is refused below
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        found: Any = PeftModel.from_pretrained(model, directory)
    wanted, allowed = (  # peft writes the whole embeddings beside an adapter on them, onpath does not
        {
            name: tuple(t.shape)
            for name, t in get_peft_model_state_dict(found, save_embedding_layers=whole).items()
        }
        for whole in (False, True)
    )
    lacking = sorted(name for name, shape in wanted.items() if given.get(name) != shape)
    foreign = sorted(given.keys() - allowed.keys())
    if lacking or foreign:
        how = (
            f"lacks {len(lacking)} of the {len(wanted)} tensors" if lacking else f"has {len(foreign)} tensors"
        )
        first = one_line((lacking or foreign)[0], 120)
        raise UserError(
            f"{key}: the adapter {directory} {how} that its config and its base have"
            f"{'' if lacking else ' not'}, the first is {first}; it was made for another model, or is damaged"
        )
    return found


def _check_index(directory: Path, where: str) -> None:
    index = read_json(directory / _INDEX, keys={"weight_map": dict})
    for name in sorted({str(v) for v in index["weight_map"].values()}):
        if not _PLAIN.fullmatch(name):
            raise UserError(
                f"{where}: {_INDEX} names {one_line(name, 80)}; only .safetensors files beside it are read"
            )
        if not (directory / name).is_file():
            raise UserError(f"{where}: {_INDEX} names {name}, which is not there; download the model again")


def _check_pickles(directory: Path, wanted: str, where: str) -> None:
    if (directory / wanted).is_file():
        return
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(kind))
    if pickles:
        raise UserError(
            f"{where}: its weights are in {one_line(pickles[0], 80)}, a format that can run code; save it as "
            f"safetensors ({wanted})"
        )
