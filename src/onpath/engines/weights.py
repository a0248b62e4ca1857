"""The weights that train, as other processes and engines take them: Hugging Face names, adapters merged."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from onpath.engines.adapters import merged_weights
from onpath.engines.head import unwrapped
from onpath.system.files import make_directory, written

PROBE_LENGTH = 16


def save_weights(model: nn.Module, directory: Path) -> None:
    """One safetensors file and the config, written aside and renamed: a reader never sees half of it.

    Raises:
        UserError: the disk is full or not writable.
    """
    make_directory(directory)
    with written(directory / "model.safetensors", also=(SafetensorError,)) as temporary:
        save_file({n: t.cpu().clone() for n, t in merged_weights(model)}, temporary, {"format": "pt"})
        unwrapped(model).config.save_pretrained(directory)


def probe_ids(vocabulary: int) -> tuple[int, ...]:
    """A fixed sequence by which two copies of a model are compared."""
    return tuple((7 * i + 3) % vocabulary for i in range(min(PROBE_LENGTH, 2 * vocabulary)))


def largest_gap(one: Sequence[float], two: Sequence[float]) -> float:
    """Between two lists of log-probs of the same tokens, nats."""
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


@torch.no_grad()
def probe_logprobs(model: nn.Module, ids: tuple[int, ...]) -> list[float]:
    """The model's own log-probs of ids[1:], each after the ones before it, nats."""
    was_training = model.training
    model.eval()
    try:
        ids_1T = torch.tensor([ids], device=next(model.parameters()).device)
        logp_TV = unwrapped(model)(input_ids=ids_1T, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    finally:
        model.train(was_training)
    return [float(v) for v in logp_TV.gather(-1, ids_1T[0, 1:, None])[:, 0]]
