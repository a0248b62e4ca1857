"""Adapters: the weight with which an adapted layer acts, how adapters are merged, and how they are saved.

peft adapts modules, but some layers are also read by their weight: the head by the losses, the embeddings by
TOPD's cost, all of them by vLLM. And where head and embeddings are one tensor, an adapter is on one of the
two: merging it would change the other with it (peft issue 2018), so they are untied first.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from onpath.engines.head import adapted_weight, base_layer, lora_deltas, sharded, unwrapped
from onpath.engines.sharding import full, gathered, local, own_rows, same_weights
from onpath.system.errors import UserError, is_lack_of_memory
from onpath.system.reading import read_json
from onpath.system.text import one_line

_CONFIG = "adapter_config.json"
_BASE = "base"  # beside an adapter whose base stands nowhere else
_MERGED_GAP = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit; half precision rounds
_MERGED_GAP_HALF = 0.1


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds a peft adapter."""
    return (Path(directory) / _CONFIG).is_file()


def own_base(adapter: Path) -> Path | None:
    """The base that was saved with an adapter: it moves with it, whatever path the adapter names."""
    base = adapter / _BASE
    return base if (base / "config.json").is_file() else None


def ends_adapted(model: PreTrainedModel) -> bool:
    """Whether an adapter is on the head or on the embeddings."""
    return any(
        isinstance(e, BaseTunerLayer) for e in (model.get_output_embeddings(), model.get_input_embeddings())
    )


def untie(model: PreTrainedModel) -> None:
    """Gives the head a weight of its own where it shares the embeddings' and one of them is adapted."""
    if not ends_adapted(model):
        return
    head, embeddings = (base_layer(x) for x in (model.get_output_embeddings(), model.get_input_embeddings()))
    if head.weight is embeddings.weight:
        assert isinstance(head.weight, nn.Parameter)
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    _say_untied(model)


def _say_untied(model: PreTrainedModel) -> None:
    """A config that says tied makes one tensor of two again when the weights are loaded."""
    head, embeddings = (base_layer(x) for x in (model.get_output_embeddings(), model.get_input_embeddings()))
    if head.weight is not embeddings.weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


@torch.no_grad()
def merged(model: PeftModel, key: str) -> PreTrainedModel:
    """The transformers model with an adapter merged into its weights.

    Raises:
        UserError: this kind of adapter cannot be merged, or the logits would be others; `key` names it.
    """
    inner, kind = unwrapped(model.eval()), str(model.active_peft_config.peft_type.value)
    untie(inner)
    table = adapted_weight(inner.get_input_embeddings())
    ids_1T = torch.arange(min(8, len(table)), device=table.device)[None]
    try:
        before = model(input_ids=ids_1T, use_cache=False).logits.float()
        plain: PreTrainedModel = model.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_lack_of_memory(error):
            raise
        raise UserError(
            f"{key}: an adapter of kind {kind} cannot be merged into its base; merge it elsewhere and name "
            "the merged model, or use a LoRA adapter"
        ) from None
    _say_untied(plain)
    after = plain(input_ids=ids_1T, use_cache=False).logits.float()
    allowed = _MERGED_GAP.get(next(plain.parameters()).dtype, _MERGED_GAP_HALF)
    if not bool((after - before).abs().max() <= allowed * before.abs().max()):
        raise UserError(
            f"{key}: merged into its base this adapter ({kind}) gives other logits than beside it; merge it "
            "elsewhere and name the merged model"
        )
    return plain


@torch.no_grad()
def merged_weights(model: nn.Module, *, adapted: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as the model without adapters has them, itself left as it is: with LoRA's deltas added,
    or without. Of a sharded model each is gathered in turn, and all processes take part.

    Tensors and names are those in memory, which a file's may not be (`weights.checkpoint_weights`). What is
    tied is given under each of its names.
    """
    for name, tensor, owners in _weights(model):
        for owner in owners if adapted else ():
            tensor = tensor + sum(lora_deltas(owner)).to(tensor.dtype)  # type: ignore[union-attr]
        yield name, full(tensor)


def empty_weights(model: nn.Module) -> dict[str, Tensor]:
    """Names, shapes and dtypes of `merged_weights`, in its order; the tensors hold nothing."""
    return {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t, _ in _weights(model)}


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, list[LoraLayer]]]:
    """(name without adapters, tensor, the adapters on it) of each weight."""
    inner = unwrapped(model)
    layers = {n: m for n, m in inner.named_modules() if isinstance(m, LoraLayer)}
    for name, tensor in inner.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if any(name.startswith(f"{owner}.lora_") for owner in _above(path) if owner in layers):
            continue
        owners = []
        while True:  # adapters of several parameters of one module are nested
            owner = layers.get(path)
            if owner is not None and leaf == _adapted_leaf(owner):
                owners.append(owner)
            if not path.endswith(".base_layer"):
                break
            path = path.removesuffix(".base_layer")
        yield f"{path}.{leaf}" if path else leaf, tensor.detach(), owners


def _above(path: str) -> Iterator[str]:
    """A module's own path and those of the modules that it is in."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _adapted_leaf(layer: LoraLayer) -> str:
    return str(layer.parameter_name) if isinstance(layer, ParamWrapper) else "weight"


def save_merged(model: nn.Module, directory: Path | None, *, adapted: bool = True) -> None:
    """A model that transformers loads by itself: with LoRA's deltas in its weights, or without any.

    Args:
        directory: None: this process takes part in gathering a sharded model, and writes nothing.
    """
    weights = merged_weights(model, adapted=adapted)
    state = gathered(weights, same_weights(model)) if sharded(model) else dict(weights)
    if directory is not None:
        unwrapped(model).save_pretrained(directory, state_dict=state)


def save(model: nn.Module, directory: Path | None, *, home: Path) -> None:
    """A model as transformers, an adapter as peft loads it.

    A student that was itself loaded from an adapter trains on merged weights, which stand nowhere on disk:
    they are saved with the new adapter, and it names them. (One adapter of both would need the first to be
    of the same kind, would grow with each stage, and could not be switched off to give the starting weights.)

    Args:
        directory: where to write it; None: this process takes part in gathering a sharded model.
        home: where it will stand.
    """
    if not isinstance(model, PeftModel):
        if sharded(model):
            save_merged(model, directory)
        elif directory is not None:
            unwrapped(model).save_pretrained(directory)
        return
    own = None
    if sharded(model):
        own = gathered(((n, p.detach()) for n, p in model.named_parameters() if p.requires_grad), {})
    if directory is not None:
        # The base's embeddings the base has.
        model.save_pretrained(str(directory), save_embedding_layers=False, state_dict=own)
    if is_adapter(model.active_peft_config.base_model_name_or_path or ""):
        save_merged(model, None if directory is None else directory / _BASE, adapted=False)
        if directory is not None:
            name_base(directory, home=home)


def load(model: nn.Module, directory: Path) -> None:
    """Gives a model with an adapter the weights of one that `save` wrote.

    Raises:
        UserError: it is damaged, or another model's.
    """
    path = directory / "adapter_model.safetensors"
    try:
        given = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {one_line(str(error))}") from None
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {n: t.shape for n, t in given.items()} != {n: t.shape for n, t in wanted.items()}:
        raise UserError(f"{path}: holds other tensors than the adapter that student.lora_* describe")
    if not sharded(model):
        set_peft_model_state_dict(model, given)
        return
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if (mine := given.get(name.replace(f".{model.active_adapter}", ""))) is not None:
                local(weight).copy_(own_rows(weight, mine))


def name_base(directory: Path, *, home: Path) -> None:
    """Lets an adapter name the base that was saved with it, if there is one, by the path it will have."""
    if own_base(directory) is not None:
        path = directory / _CONFIG
        described = {**read_json(path, keys={}), "base_model_name_or_path": str(home.resolve() / _BASE)}
        path.write_text(json.dumps(described, indent=2) + "\n")
