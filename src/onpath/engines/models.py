"""Loading Hugging Face models and tokenizers."""

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import logging as hf_logging

from onpath.config import Student, Teacher
from onpath.data.tasks import part_of, task_of
from onpath.engines import foreign, late
from onpath.engines.adapters import is_adapter, merged, own_base
from onpath.engines.linear import with_fast_products
from onpath.system.errors import UserError
from onpath.system.files import place
from onpath.system.reading import read_json
from onpath.system.text import first_line, one_line

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""LoRA's ways to start that leave the base as it is."""
_PLAIN_OUTPUT = {
    "output_router_logits": False, "output_attentions": False, "output_hidden_states": False,
    "return_dict": True,
}  # fmt: skip
"""Keys of configs that change what a forward pass gives, some of them what it can be asked
(transformers issue 39203); losses need none of them."""


def locate(name: str) -> str:
    """`gym:student` → the directory of the task's model, a finished run's → that of its final model; anything
    else unchanged."""
    task = task_of(name)
    if task is None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            run = Path(name).expanduser()
            if (run / "metrics.jsonl").is_file() and (run / "model").is_dir():
                return str(run / "model")
        return name
    try:
        return str(task.model(part_of(name)))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def pick_device(name: str, key: str, otherwise: torch.device | None = None) -> torch.device:
    """`auto` → `otherwise`, else the first GPU, else the CPU. `key` names the option in errors."""
    if name == "auto":
        return otherwise or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch's ways to say: unknown, not built, not there
        raise UserError(f"{key} is {name}, which torch cannot use here: {first_line(error)}") from None
    return device


def load_model(
    section: Student | Teacher, key: str, device: torch.device, *, shards: bool = False
) -> PreTrainedModel:
    """A causal LM from safetensors, in evaluation mode, without gradients.

    Args:
        shards: it is to be sharded; weights stored in half precision are cast then (see `late`).

    Raises:
        UserError: nothing readable there; `key` names the option.
    """
    where = _existing(section.model, key)
    source = str(Path(where).resolve()) if Path(where).is_dir() else where
    adapter = where if is_adapter(where) else None
    if adapter:
        where = _base_of(Path(adapter), key)
        foreign.check_adapter(Path(adapter), key)  # before the base, which is large, is loaded
    if Path(where).is_dir():
        foreign.check_model(Path(where), key)
    with _loading(section, key):
        options = _quantised(section, key, device)
        waiting = _waiting(where, section) if shards and not (adapter or options) else None
        model, found = waiting or _from_pretrained(where, section, section.dtype, **options)
        if adapter:
            model = merged(foreign.loaded_adapter(model, adapter, key), f"{key}: {section.model}")
    _check_complete(found, section, key)
    frozen: PreTrainedModel = with_fast_products(model.eval().requires_grad_(False))
    nn.Module.to(frozen, device)  # in place; transformers' own `to` is untyped
    for config in (frozen.config, frozen.config.get_text_config()):
        for name, value in _PLAIN_OUTPUT.items():
            if hasattr(config, name):
                setattr(config, name, value)
    frozen.name_or_path = source  # what a new adapter names as its base, from wherever it is loaded
    return frozen


def _from_pretrained(where: str, section: Student | Teacher, dtype: str, **options: Any) -> Any:
    """A model, and what was found of it."""
    return AutoModelForCausalLM.from_pretrained(
        where,
        dtype=getattr(torch, dtype),
        trust_remote_code=section.trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )


def _waiting(where: str, section: Student | Teacher) -> Any:
    """A model whose weights wait in the file's half precision, and what was found of it. None: there is
    nothing to wait for, or it makes buffers in its weights' dtype, which would be rounded."""
    stored = late.stored_dtype(where)
    if stored is None or section.dtype != "float32":
        return None
    model, found = _from_pretrained(where, section, stored)
    if any(buffer.dtype == getattr(torch, stored) for buffer in model.buffers()):
        return None
    late.wait(model, torch.float32)
    return model, found


def load_beside(section: Student | Teacher, key: str, base: PreTrainedModel) -> PeftModel:
    """An adapter on a copy of a base's modules that has the base's very weights: what several adapters of one
    base take is the base once, and what each adds.

    Raises:
        UserError: see `load_model`.
    """
    where = _existing(section.model, key)
    foreign.check_adapter(Path(where), key)
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    with _loading(section, key):
        model: PeftModel = foreign.loaded_adapter(copy.deepcopy(base, shared), where, key)
    return with_fast_products(model).eval().requires_grad_(False).to(next(base.parameters()).device)


def stays_beside(directory: str) -> bool:
    """Whether an adapter only adds to its base's weights, wherever it is: none is put in their place, changed
    when it is loaded (PiSSA and its like), or made to act at some tokens only."""
    told = read_json(Path(directory) / "adapter_config.json", keys={})
    other = ("modules_to_save", "trainable_token_indices", "alora_invocation_tokens")
    if told.get("peft_type") != "LORA" or any(told.get(key) for key in other):
        return False
    if told.get("bias", "none") != "none" or told.get("init_lora_weights", True) not in _PLAIN_STARTS:
        return False
    try:
        with safe_open(Path(directory) / "adapter_model.safetensors", framework="pt") as file:
            return all("lora_" in name for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return True  # loading it says what is wrong


@contextlib.contextmanager
def _loading(section: Student | Teacher, key: str) -> Iterator[None]:
    try:
        with quietly():
            yield
    except SafetensorError as error:
        raise UserError(f"{key}: {section.model} is damaged: {first_line(error)}") from None
    except UserError:
        raise
    except foreign.FAILURES as error:
        raise UserError(f"{key}: cannot load a causal LM from {section.model}: {first_line(error)}") from None


def _quantised(section: Student | Teacher, key: str, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes for quantised weights, which must be made where they stay."""
    if section.quantization is None:
        return {}
    where = f"{key.removesuffix('.model')}.quantization"
    if is_adapter(locate(section.model)):
        raise UserError(
            f"{where}: {section.model} is an adapter, which is merged into its base, and quantised weights "
            "would round it; export it first (onpath export, or peft's merge_and_unload)"
        )
    try:
        found = AutoQuantizationConfig.from_dict(dict(section.quantization))
    except foreign.FAILURES as error:
        raise UserError(
            f"{where}: {first_line(error)}; give one of transformers' quantisation configs, such as "
            "{quant_method: bitsandbytes, load_in_4bit: true}"
        ) from None
    return {"quantization_config": found, **({} if device.type == "cpu" else {"device_map": {"": device}})}


def _check_complete(found: Mapping[str, Any], section: Student | Teacher, key: str) -> None:
    """transformers fills weights that are missing, or of another shape, with random numbers."""
    lacking = sorted(found["missing_keys"]) or sorted(str(m[0]) for m in found["mismatched_keys"])
    if lacking:
        how = "are missing" if found["missing_keys"] else "have another shape than its config.json says"
        raise UserError(
            f"{key}: {len(lacking)} weights of {section.model} {how}, the first is {lacking[0]}; "
            "save or download the model again"
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' load report (our errors say it in one sentence), without its progress bars, and
    without its warning that gradient checkpointing has a new name from 5.23 on: peft asks for the old one,
    and so do we, for the versions before. Afterwards all is as the program had it."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    no_downloads = are_progress_bars_disabled()  # huggingface_hub's bars are another switch
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        # peft's warning of an adapter on a tied head or embedding, which adapters.py unties.
        warnings.filterwarnings(
            "ignore", message=".*a tied layer is part of the adapter", category=UserWarning
        )
        # Where the environment decides on download bars, each of our calls would be answered with a warning.
        warnings.filterwarnings("ignore", message="Cannot (en|dis)able progress bars", category=UserWarning)
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        try:
            yield
        finally:
            hf_logging.set_verbosity(verbosity)
            if bars:
                hf_logging.enable_progress_bar()
            disable_progress_bars() if no_downloads else enable_progress_bars()


def model_directory(name: str, key: str) -> str:
    """Where a model's config lies: its directory or hub name; of an adapter, its base's."""
    where = _existing(name, key)
    return _base_of(Path(where), key) if is_adapter(where) else where


def _base_of(adapter: Path, key: str) -> str:
    if (beside := own_base(adapter)) is not None:
        return str(beside)
    told = read_json(adapter / "adapter_config.json", keys={"base_model_name_or_path": str})
    return _existing(told["base_model_name_or_path"], f"{key}: the base of adapter {adapter}")


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(section: Student | Teacher, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    where = _existing(section.model, key)
    if is_adapter(where) and not _has_tokenizer(Path(where)):  # peft saves none: it is the base's
        where = _base_of(Path(where), key)
    here = Path(where).is_dir()
    if here and not ((Path(where) / "config.json").is_file() or is_adapter(where)):
        raise UserError(f"{key}: {section.model} is no model's directory: it has no config.json")
    if here and not _has_tokenizer(Path(where)):
        # transformers would make an empty one without a word
        raise UserError(
            f"{key}: {section.model} has no tokenizer; save one there (tokenizer.save_pretrained)"
        )
    try:
        with quietly():
            return AutoTokenizer.from_pretrained(where, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # the tokenizers library raises nothing more precise
        nowhere = "" if here else f"there is no directory {section.model} here, and of the hub's models: "
        raise UserError(
            f"{key}: {nowhere}cannot load a tokenizer from {section.model}: {first_line(error)}"
        ) from None


def _existing(name: str, key: str) -> str:
    where = locate(name)
    if not where:
        raise UserError(f"{key} is empty; name a directory or a model of the hub")
    looks_local, path = where.startswith((".", "/", "~")) or where.count("/") > 1, place(where, key=key)
    looks_local |= "/" in where and any(path.parent.glob("*/metrics.jsonl"))  # beside runs, as a run would
    if path.is_file():
        raise UserError(f"{key}: {name} is a file; name the directory of a model")
    if looks_local and not path.is_dir():
        raise UserError(f"{key}: there is no directory {name}")
    return str(path) if path.is_dir() else where


def check_vocabulary(
    student: Mapping[str, int], teacher: Mapping[str, int], key: str = "teacher.model"
) -> None:
    """Both must map every token to the same id; sizes say nothing.

    Raises:
        UserError: naming up to five tokens that differ.
    """
    differing = [t for t in {**student, **teacher} if student.get(t) != teacher.get(t)]
    if differing:
        shown = "; ".join(
            f"{t!r} is {student.get(t, 'absent')} for the student, {teacher.get(t, 'absent')} for the teacher"
            for t in differing[:5]
        )
        raise UserError(
            f"{key}: student and teacher must share one vocabulary, but {len(differing)} tokens differ: "
            f"{shown}; choose a teacher of the student's model family"
        )


def stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, key: str = "student.model"
) -> frozenset[int]:
    """Every id that ends a response: the generation config's and the tokenizer's EOS."""
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = eos_ids(listed, key)
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise UserError(
            f"{key}: neither its tokenizer nor its generation config names an EOS token, so responses could "
            f"never end"
        )
    return frozenset(ids)


def eos_ids(listed: Any, key: str) -> set[int]:
    """What a config names as its EOS: a number, a list or nothing.

    Raises:
        UserError: something else.
    """
    ids = listed if isinstance(listed, list | tuple) else [] if listed is None else [listed]
    if any(type(i) is not int or i < 0 for i in ids):
        raise UserError(
            f"{key}: generation_config.json: eos_token_id is {one_line(repr(listed), 60)}, which is no token "
            "id, nor a list of them"
        )
    return set(ids)


def context_length(config: PreTrainedConfig) -> int:
    """Most positions that a model was made for; `sys.maxsize` where its config names no limit (BLOOM, Mamba).

    Where the scale of the positions switches at some length (LongRoPE), for all rows of a batch as soon as
    one is longer, it is that length: beyond it a row would depend on the rows beside it.
    """
    text = config.get_text_config()
    named: dict[str, Any] = text.to_dict()
    limits = [text.max_position_embeddings if hasattr(text, "max_position_embeddings") else None]
    limits += _switches(named.get("rope_parameters"), named.get("original_max_position_embeddings"))
    return min((n for n in limits if isinstance(n, int) and n > 0), default=sys.maxsize)


def _switches(rope: Any, original: Any) -> list[Any]:
    """Lengths at which rotary positions are scaled otherwise; each kind of layer may have its own."""
    if not isinstance(rope, Mapping):
        return []
    found = [n for inner in rope.values() for n in _switches(inner, original)]
    if rope.get("rope_type") == "longrope":
        found.append(rope.get("original_max_position_embeddings", original))
    return found
