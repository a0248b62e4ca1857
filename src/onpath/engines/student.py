"""The student that trains: all of its weights or an adapter, and the ids that it shares with the teacher."""

import copy
import re
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from onpath.config.sections import teacher_option
from onpath.config.whole import Config
from onpath.engines import late
from onpath.engines.adapters import untie
from onpath.engines.head import unwrapped
from onpath.engines.linear import with_fast_products
from onpath.engines.models import check_vocabulary, load_tokenizer, locate, quietly
from onpath.system.errors import UserError
from onpath.system.text import first_line

_LOUD = 4.0
"""lora_alpha ÷ lora_rank above which it is worth a word, where nobody chose it."""
_SMALL = 10**9
"""Weights up to which a model may well write its rollouts itself, token by token."""
_SHORT = 256
"""Tokens of a rollout up to which any may."""
_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_NOISE = re.compile(r"^(?!summary|classifier).*(drop|jitter)")
"""Of a config's entries those that may be noise of training mode; the heads of classifiers are not here."""


def trainable(config: Config, base: nn.Module) -> nn.Module:
    """The student with gradients on: on all weights, or on a new LoRA adapter."""
    section = config.student
    if section.gradient_checkpointing:
        recompute(base)
    if section.lora_rank == 0:
        return base.requires_grad_(True)
    torch.manual_seed(config.run.seed)
    lora = LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,  # type: ignore[arg-type]  # peft divides, and takes floats
        target_modules=section.lora_targets,
        task_type="CAUSAL_LM",
        lora_dropout=section.lora_dropout,
    )
    try:
        check_targets(section.lora_targets, unwrapped(base))
        with quietly(), late.as_if_cast(base):
            model: nn.Module = get_peft_model(base, lora)
    except UserError:
        raise
    except (ValueError, re.error) as error:
        raise UserError(f"student.lora_targets: {first_line(error)}") from None
    untie(unwrapped(model))
    return with_fast_products(model)


def check_targets(targets: str | list[str], model: nn.Module) -> None:
    """peft is content if one name of several is a module's, and leaves out the others without a word.

    Raises:
        UserError: no module has a name that is asked for.
        re.error: a text is no regular expression.
    """
    if targets == "all-linear":
        return
    modules = dict(model.named_modules())
    linear = {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear)}
    known = f"linear ones are {', '.join(sorted(linear))}" if linear else "it has no linear ones"
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in modules):
            form = (
                "a text is a regular expression of whole names, such as .*mlp.*; names are a list, [q_proj]"
            )
            raise UserError(f"student.lora_targets: no module is called {targets!r}; {form}; {known}")
        return
    for target in targets or [""]:
        if not target or not any(f".{name}".endswith(f".{target}") for name in modules):
            raise UserError(f"student.lora_targets: no module is called {target!r}; {known}")


def recompute(model: nn.Module) -> None:
    """Activations of each layer are computed again in the backward pass.

    transformers does so in training mode alone, which brings dropout and router noise with it; without that
    mode it is done here.
    """
    inner = unwrapped(model)
    layers = [m for m in inner.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or not inner.supports_gradient_checkpointing:
        kind = inner.config.model_type
        raise UserError(f"student.gradient_checkpointing: {kind} models cannot do that; set it to false")
    with quietly():
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        # A bound method, so that a deep copy of the model recomputes its own layers.
        layer.forward = MethodType(_recomputed, layer)


def _recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(layer).forward, layer)
    if layer.training or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def copy_of(student: nn.Module, *, alone: bool) -> nn.Module:
    """A copy that does not train, with its own of the weights that do, and the student's very others.

    Args:
        alone: it has all weights to itself: what is sharded must be nobody else's.
    """
    shared = {} if alone else {id(p): p for p in student.parameters() if not p.requires_grad}
    return copy.deepcopy(student, shared).requires_grad_(False)


def trained_in(copied: nn.Module, student: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each weight that trains, by name: the copy's and the student's."""
    own = dict(copied.named_parameters())
    return {name: (own[name], p) for name, p in student.named_parameters() if p.requires_grad}


def precision_warning(config: Config) -> str | None:
    """Where small updates are rounded away."""
    student = config.student
    if student.dtype == "float32" or student.lora_rank:
        return None
    return (
        f"student.dtype: {student.dtype} without student.lora_rank: updates smaller than a weight's last "
        "digit are lost, most of them at small rates; use float32 with optim.bf16: true"
    )


def scale_warning(config: Config) -> str | None:
    """Where the default of lora_alpha, which goes with the default recipes' rank, makes an adapter loud."""
    student = config.student
    if not student.lora_rank or "lora_alpha" in student.model_fields_set:
        return None
    scale = student.lora_alpha / student.lora_rank
    if scale <= _LOUD:
        return None
    return (
        f"student.lora_alpha is {student.lora_alpha:g}, the default, which goes with rank 64: an adapter of "
        f"rank {student.lora_rank} acts {scale:g} times, as if the rate were higher; "
        f"{2 * student.lora_rank} would be twice"
    )


def dropout_warning(config: Config, student: nn.Module) -> str | None:
    """Where student.dropout has nothing to let act."""
    if not config.student.dropout or has_noise(student):
        return None
    return (
        f"student.dropout: true has no effect here: {config.student.model} has no dropout above 0, and no "
        "router noise; set it in the model's config, as attention_dropout say, or student.lora_dropout, or "
        "leave student.dropout out"
    )


def sampling_warning(config: Config, student: nn.Module) -> str | None:
    """Where a large student writes long rollouts token by token."""
    weights, longest = sum(p.numel() for p in student.parameters()), config.rollout.max_new_tokens
    if config.rollout.engine != "hf" or weights <= _SMALL or longest <= _SHORT:
        return None
    return (
        f"rollout.engine: hf runs all {weights / 1e9:.1f}B weights of the student {longest:,} times for each "
        "batch of rollouts, one token after another; rollout.engine: vllm is made for that (docs/engines.md)"
    )


def has_noise(model: nn.Module) -> bool:
    """Whether a model draws something in training mode, as far as its modules and its config say."""
    inner = unwrapped(model)
    # The losses read head and embeddings by their weight: an adapter's dropout there has no effect.
    ends = [end for end in (inner.get_input_embeddings(), inner.get_output_embeddings()) if end is not None]
    still = {id(m) for end in ends for m in end.modules()}
    if any(isinstance(m, _DROPOUTS) and m.p > 0 and id(m) not in still for m in model.modules()):
        return True
    told = unwrapped(model).config.get_text_config().to_dict().items()
    return any(_NOISE.search(k) and isinstance(v, int | float) and v is not True and v > 0 for k, v in told)


def shared_vocabulary(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """Number of ids that student and teachers share, and what looks odd about a pair."""
    ids = tokenizer.get_vocab()
    if config.method.self_taught:
        return max(ids.values()) + 1, []
    if config.teacher.engine == "chat":
        warning = (
            f"teacher.engine chat: {config.teacher.model} gives text and no log-probs, so the student learns "
            "by cross-entropy along what it generates, and no divergence is measured"
        )
        return max(ids.values()) + 1, [warning]
    warnings = []
    for name, section in config.sharing_ids.items():
        key = f"{teacher_option(name)}.model"
        unset = f" (not given, so {section.model})" if "model" not in section.model_fields_set else ""
        check_vocabulary(ids, load_tokenizer(section, key).get_vocab(), key + unset)
        if Path(locate(config.student.model)).resolve() == Path(locate(section.model)).resolve():
            warnings.append(
                f"{key} is the student's own directory ({config.student.model}): "
                "the loss starts at 0 and teaches nothing"
            )
    return max(ids.values()) + 1, warnings
