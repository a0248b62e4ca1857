"""The two halves of a causal LM that the losses use: the decoder's hidden states, and the head.

Shape suffixes: B rows, T tokens, V vocabulary, H hidden.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeGuard

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from onpath.losses import Head
from onpath.system import distributed, products
from onpath.system.errors import UserError

# Models whose logits are not plainly hidden @ head.T say so in their config under these names.
_SOFTCAP = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_DIVIDE = "logits_scaling"
_MULTIPLY = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model without dropout and the like; afterwards it is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@contextlib.contextmanager
def generating(model: nn.Module, *, bf16: bool) -> Iterator[None]:
    """As `evaluating`, for many passes of a few tokens.

    Under autocast the weights of linear layers are cast once: PyTorch keeps casts within one context, of
    weights that train alone, so each token would cast all of them anew. The same bits.

    Args:
        bf16: whether the passes run under bfloat16 autocast.
    """
    layers = [] if not bf16 or sharded(model) else [m for m in model.modules() if isinstance(m, nn.Linear)]
    own = [(m._parameters, n, p) for m in layers for n, p in m._parameters.items() if _is_float32(p)]
    with evaluating(model):
        try:
            for parameters, name, weight in own:
                parameters[name] = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
            yield
        finally:
            for parameters, name, weight in own:
                parameters[name] = weight


def _is_float32(weight: nn.Parameter | None) -> TypeGuard[nn.Parameter]:
    """Whether it is a plain one; a quantised one is not."""
    return type(weight) is nn.Parameter and weight.dtype == torch.float32


def is_quantised(model: nn.Module) -> bool:
    """Whether transformers has quantised its weights."""
    return unwrapped(model).config.to_dict().get("quantization_config") is not None


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper (its layers still adapted), or the model itself."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def sharded(model: nn.Module) -> bool:
    """Whether this process holds some rows of each weight only (`engines/sharding.py`)."""
    return isinstance(model.get_base_model() if isinstance(model, PeftModel) else model, FSDPModule)


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer that an adapter is on, or the layer itself."""
    found: nn.Module = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return found


def adapted_weight(layer: nn.Module) -> Tensor:
    """The weight with which a layer acts, LoRA's delta added: [V, H] of a head or of embeddings. Gradients
    reach the adapter through it; an adapter that is switched off adds nothing."""
    weight = base_layer(layer).weight
    assert isinstance(weight, Tensor)
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return weight
    for delta in lora_deltas(layer):
        weight = weight + delta.to(weight.dtype)
    return weight


def table_of(model: nn.Module) -> Tensor:
    """The weight of the embeddings, without adapters."""
    weight = base_layer(unwrapped(model).get_input_embeddings()).weight
    assert isinstance(weight, Tensor)
    return weight


def width_of(model: nn.Module) -> int:
    """Size of the hidden states that its output layer takes."""
    return base_layer(unwrapped(model).get_output_embeddings()).weight.shape[-1]  # type: ignore


def lora_deltas(layer: LoraLayer) -> Iterator[Tensor]:
    """What each active adapter adds to a layer's weight."""
    for name in layer.active_adapters:
        if name in layer.r:
            yield layer.get_delta_weight(name)  # type: ignore[attr-defined]


def _named(config: Any, names: tuple[str, ...]) -> Any:
    """The first of these keys that a config sets."""
    return next((v for v in (getattr(config, name, None) for name in names) if v is not None), None)


def head_of(model: nn.Module, vocabulary: int | None = None) -> Head:
    """The map from hidden states to logits; rows beyond `vocabulary` are padding and take no part. Of a
    sharded model it is gathered, and all processes take part."""
    inner = unwrapped(model)
    if sharded(model):
        own: Any = inner.get_output_embeddings()
        unit: Any = own if isinstance(own, FSDPModule) else inner
        unit.unshard()
    config = inner.config.get_text_config()
    layer = inner.get_output_embeddings()
    bias = base_layer(layer).bias
    assert bias is None or isinstance(bias, Tensor)
    factor = 1.0 if (named := _named(config, _MULTIPLY)) is None else named
    scale = float(factor) / float(_named(config, (_DIVIDE,)) or 1.0)
    return Head(
        weight=adapted_weight(layer),
        bias=bias,
        logit_scale=scale,
        softcap=_named(config, _SOFTCAP),
        tokens=vocabulary,
    )


def logits_of(head: Head, hidden: Tensor) -> Tensor:
    """[..., H] → [..., V], float32, for a few tokens at a time: the losses make them in chunks."""
    rows = head.vocabulary
    bias = None if head.bias is None else head.bias[:rows]
    logits = products.linear(hidden, head.weight[:rows], bias).float() * head.logit_scale
    return logits if head.softcap is None else (logits / head.softcap).tanh() * head.softcap


@torch.no_grad()
def own_logprobs(model: nn.Module, ids: Sequence[int], vocabulary: int | None = None) -> Tensor:
    """Log-probs [T − 1] of ids[1:], each after the ones before it, by the model's own forward pass over them
    alone, nats.

    Args:
        vocabulary: logits beyond it take no part.
    """
    inner = unwrapped(model)
    ids_1T = torch.tensor([ids], device=next(inner.parameters()).device)
    with evaluating(model):
        logits_1TV: Tensor = inner(input_ids=ids_1T, **known_to(inner, use_cache=False)).logits
    logp_TV = logits_1TV[0, :-1, :vocabulary].float().log_softmax(-1)
    return logp_TV.gather(-1, ids_1T[0, 1:, None])[:, 0]


@contextlib.contextmanager
def foreign(model: PreTrainedModel, key: str) -> Iterator[None]:
    """While a model's own code runs on what we ask of it, which may be nothing that it knows.

    Raises:
        UserError: whatever it raises, in one sentence; `key` names the model.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if distributed.lost_a_peer(error):
            raise
        said = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(
            f"{key}: {model.config.model_type} models do not do what onpath asks of a causal LM "
            f"({type(error).__name__}: {said[:200]}); use another model family"
        ) from error


@torch.no_grad()
def check_head(model: nn.Module, key: str) -> None:
    """Compares the logits that the losses will form with the model's own, on four tokens.

    Raises:
        UserError: the model does something to its logits that `head_of` does not know, or fails.
    """
    with foreign(unwrapped(model), key), evaluating(model):
        _check_head(model, key)


def _check_head(model: nn.Module, key: str) -> None:
    inner = unwrapped(model)
    ids_BT = torch.arange(4, device=next(inner.parameters()).device)[None]
    expected_BTV = inner(input_ids=ids_BT).logits.float()
    hidden_BTH = hidden_states(model, ids_BT)
    found_BTV = logits_of(head_of(model), hidden_BTH)  # last: a sharded model's own pass gives its head back
    if not bool(expected_BTV.isfinite().all()):
        named = (name for name, weight in inner.named_parameters() if not bool(weight.isfinite().all()))
        raise UserError(
            f"{key}: its logits are not finite ({next(named, 'no weight')} holds values that are not); use "
            "another checkpoint, or float32 if its dtype is too narrow"
        )
    scale = expected_BTV.abs().max().clamp(min=1e-6)
    if not bool(((found_BTV - expected_BTV).abs().max() / scale) < 0.02):
        raise UserError(
            f"{key}: {inner.config.model_type} models change their logits in a way that onpath does not "
            "know, so losses would be wrong; use another model family"
        )


def hidden_states(model: nn.Module, ids_BT: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """Last hidden states [B, T, H] of right-padded ids; the head is applied elsewhere, in chunks. An empty
    `cache` receives the keys and values.

    No mask is given: no token of a causal model sees the padding behind it, and without a mask attention
    runs in its fused causal kernels and builds no [T, T] of its own.
    """
    given = {"past_key_values": cache, "use_cache": cache is not None}
    return read(model, ids_BT, **known_to(decoder_of(model), **given))


def read(model: nn.Module, ids_BT: Tensor, **given: Any) -> Tensor:
    """[B, T, H]: the decoder alone; a sharded model's through its root."""
    forward: Any = unwrapped(model).read if sharded(model) else decoder_of(model)
    return forward(input_ids=ids_BT, **given).last_hidden_state  # type: ignore[no-any-return]


def decoder_of(model: nn.Module) -> nn.Module:
    """What makes hidden states of ids. Llama 4's is not where transformers looks for it."""
    inner = unwrapped(model)
    found: nn.Module = inner.get_decoder()
    if found is inner:
        found = next((child for child in inner.children() if isinstance(child, PreTrainedModel)), inner)
    return found


def known_to(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Those arguments that a model's forward pass has by name: what it only swallows would do nothing, and
    some refuse what they do not know."""
    known = _parameters(type(model).forward)
    return {name: value for name, value in arguments.items() if name in known}


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """The names of its arguments: reading them takes as long as a small layer, and each token asks."""
    return frozenset(inspect.signature(forward).parameters)
