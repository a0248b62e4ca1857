"""Batched sampling for the gym's own needs (pools, measurements): ids in, ids out."""

from collections.abc import Sequence
from typing import Any

import torch

from onpath.gym.language import EOS, PAD, Language
from onpath.gym.vocab import LANGUAGE

context_ids = LANGUAGE.context_ids


@torch.no_grad()
def sample_ids(
    model: Any,
    contexts: Sequence[list[int]],
    *,
    temperature: float = 1.0,
    max_new: int = 120,
    batch: int = 256,
    language: Language = LANGUAGE,
) -> list[list[int]]:
    """One continuation of each context, the end token included if it was drawn; temperature 0 is greedy."""
    out: list[list[int]] = [[] for _ in contexts]
    pad, eos = language.ids[PAD], language.ids[EOS]
    by_length = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    how: dict[str, Any] = drawn if temperature > 0 else {"do_sample": False}
    for at in range(0, len(contexts), batch):
        part = by_length[at : at + batch]
        width = max(len(contexts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(contexts[i])) + contexts[i] for i in part])
        mask = torch.tensor([[0] * (width - len(contexts[i])) + [1] * len(contexts[i]) for i in part])
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new, **how)
        for i, row in zip(part, made[:, width:].tolist(), strict=True):
            out[i] = row[: row.index(eos) + 1] if eos in row else row
    return out


def sample(
    model: Any,
    messages: Sequence[str],
    *,
    temperature: float = 1.0,
    max_new: int = 120,
    language: Language = LANGUAGE,
) -> list[list[str]]:
    """One response to each user message, as token strings."""
    contexts = [language.context_ids(m) for m in messages]
    made = sample_ids(model, contexts, temperature=temperature, max_new=max_new, language=language)
    return [[language.tokens[i] for i in ids] for ids in made]
