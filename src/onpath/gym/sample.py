"""Batched sampling for the gym's own needs (pools, measurements): ids in, ids out."""

from collections.abc import Sequence
from typing import Any

import torch

from onpath.gym.vocab import BOS, EOS, IDS, PAD, SOL, TOKENS, encode


def context_ids(message: str) -> list[int]:
    """What the chat template makes of a user message, up to where the response starts."""
    return [IDS[BOS], *encode(message), IDS[SOL]]


@torch.no_grad()
def sample_ids(
    model: Any,
    contexts: Sequence[list[int]],
    *,
    temperature: float = 1.0,
    max_new: int = 120,
    batch: int = 256,
) -> list[list[int]]:
    """One continuation of each context, the end token included if it was drawn; temperature 0 is greedy."""
    out: list[list[int]] = [[] for _ in contexts]
    by_length = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    how: dict[str, Any] = drawn if temperature > 0 else {"do_sample": False}
    for at in range(0, len(contexts), batch):
        part = by_length[at : at + batch]
        width = max(len(contexts[i]) for i in part)
        ids = torch.tensor([[IDS[PAD]] * (width - len(contexts[i])) + contexts[i] for i in part])
        mask = torch.tensor([[0] * (width - len(contexts[i])) + [1] * len(contexts[i]) for i in part])
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new, **how)
        for i, row in zip(part, made[:, width:].tolist(), strict=True):
            out[i] = row[: row.index(IDS[EOS]) + 1] if IDS[EOS] in row else row
    return out


def sample(
    model: Any, messages: Sequence[str], *, temperature: float = 1.0, max_new: int = 120
) -> list[list[str]]:
    """One response to each user message, as token strings."""
    made = sample_ids(model, [context_ids(m) for m in messages], temperature=temperature, max_new=max_new)
    return [[TOKENS[i] for i in ids] for ids in made]
