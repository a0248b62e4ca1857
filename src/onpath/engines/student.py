"""The student that trains: all of its weights or an adapter, and the ids that it shares with the teacher."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from onpath.config.build import Config
from onpath.engines.adapters import untie
from onpath.engines.head import unwrapped
from onpath.engines.models import check_vocabulary, load_tokenizer, locate, quietly
from onpath.system.errors import UserError


def trainable(config: Config, base: nn.Module) -> nn.Module:
    """The student with gradients on: on all weights, or on a new LoRA adapter."""
    section = config.student
    if section.gradient_checkpointing:
        with quietly():
            unwrapped(base).gradient_checkpointing_enable({"use_reentrant": False})
    if section.lora_rank == 0:
        return base.requires_grad_(True)
    torch.manual_seed(config.run.seed)
    lora = LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,  # type: ignore[arg-type]  # peft divides, and takes floats
        target_modules=section.lora_targets,
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )
    try:
        with quietly():
            model: nn.Module = get_peft_model(base, lora)
    except ValueError as error:
        raise UserError(f"student.lora_targets: {str(error).splitlines()[0]}") from None
    untie(unwrapped(model))
    if section.gradient_checkpointing:
        unwrapped(model).enable_input_require_grads()
    return model


def shared_vocabulary(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """Number of ids that student and teacher share, and what looks odd about the pair."""
    ids = tokenizer.get_vocab()
    if config.method.self_taught:
        return max(ids.values()) + 1, []
    if config.teacher.engine == "chat":
        warning = (
            f"teacher.engine chat: {config.teacher.model} gives text and no log-probs, so the student learns "
            "by cross-entropy along what it generates, and no divergence is measured"
        )
        return max(ids.values()) + 1, [warning]
    check_vocabulary(ids, load_tokenizer(config.teacher, "teacher.model").get_vocab())
    same = Path(locate(config.student.model)).resolve() == Path(locate(config.teacher.model)).resolve()
    warning = (
        f"teacher.model is the student's own directory ({config.student.model}): "
        "the loss starts at 0 and teaches nothing"
    )
    return max(ids.values()) + 1, [warning] if same else []
