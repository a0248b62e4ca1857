"""Digests of what a run's options name: a path says where its data and models lie, not what they are."""

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from onpath.config.changes import own_code
from onpath.config.sections import teacher_option
from onpath.data.load import digest_prompts
from onpath.engines.score_cache import weights_digest
from onpath.engines.sharding import digest_weights
from onpath.run.parts import Parts
from onpath.system import code

_OF_CODE = ("method", "eval", "rewards")
"""Sections whose options name own code."""


def digests(parts: Parts) -> dict[str, str]:
    """Option → digest of what it names. Call it while the student has its starting weights; about a second
    per GB. A server's weights cannot be seen. All processes take part where models are sharded.
    """
    config, models = parts.config, parts.models
    found = {"data.train": digest_prompts(parts.prompts.pool)}
    found |= {f"data.eval.{split}": digest_prompts(prompts) for split, prompts in parts.prompts.evals.items()}
    tokenizer, adapted = parts.text.renderer.tokenizer, config.student.lora_rank > 0
    found["student.model"] = digest_start(models.student, tokenizer, adapted=adapted)
    for name in models.teacher.names if not config.method.self_taught else ():
        if (model := models.teacher.of(name).model) is not None:
            found[f"{teacher_option(name)}.model"] = weights_digest(model)
    return found | code.digests(own_code(config))


@torch.no_grad()
def digest_start(student: nn.Module, tokenizer: PreTrainedTokenizerBase, *, adapted: bool) -> str:
    """Of what a student starts from, wherever it lies: weights, vocabulary and chat template.

    Args:
        adapted: an adapter's own weights do not count: they are drawn, by other numbers on another device.
    """
    loaded = {n: p for n, p in student.named_parameters() if not adapted or not p.requires_grad}
    digest = hashlib.blake2b(digest_size=16)
    for part in _described(tokenizer):
        digest.update(part.encode())
    digest_weights(digest, loaded)
    return digest.hexdigest()


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Options whose content is another; none where nobody knows what it was.

    Args:
        before: digests; those of own code may lack, as earlier versions kept none.
    """
    both = {*before} & {*now}
    named = {key for key in {*before, *now} if key.partition(".")[0] not in _OF_CODE or key in both}
    return sorted(key for key in named if before and before.get(key) != now.get(key))


def _described(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What decides the ids of a prompt."""
    yield json.dumps(tokenizer.get_vocab(), sort_keys=True)
    yield json.dumps(tokenizer.chat_template, sort_keys=True)
