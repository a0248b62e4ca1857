"""The weights that train, as other processes and engines take them: Hugging Face names, adapters merged."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from onpath.engines.head import unwrapped
from onpath.system.errors import UserError

PROBE_LENGTH = 16
_UNMOVED = 1e-6  # nats: one copy asked twice gives the same to the last digits


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as the model's own checkpoint has them; LoRA's deltas added, the model left as it is.

    A tied output layer is given under both its names: vLLM on a CPU keeps a packed copy of it.
    """
    inner = unwrapped(model)
    adapted = {n: m for n, m in inner.named_modules() if isinstance(m, LoraLayer)}
    for name, tensor in inner.state_dict().items():
        if ".lora_" in name:
            continue
        path, _, leaf = name.rpartition(".")
        owner = adapted.get(path.removesuffix(".base_layer"))
        if owner is not None and leaf == "weight":
            deltas = [owner.get_delta_weight(a) for a in owner.active_adapters if a in owner.lora_A]  # type: ignore[attr-defined]
            tensor = tensor + torch.stack(deltas).sum(0).to(tensor.dtype) if deltas else tensor
        yield name.replace(".base_layer.", "."), tensor.detach()


def save_weights(model: nn.Module, directory: Path) -> None:
    """One safetensors file and the config, written aside and renamed: a reader never sees half of it.

    Raises:
        UserError: the disk is full or not writable.
    """
    temporary = directory / f"model.safetensors.{os.getpid()}.part"  # every process of a run writes
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({n: t.cpu().clone() for n, t in merged_weights(model)}, temporary, {"format": "pt"})
        unwrapped(model).config.save_pretrained(directory)
        temporary.replace(directory / "model.safetensors")
    except OSError as error:
        raise UserError(f"{directory}: cannot write the weights: {error.strerror or error}") from None


def probe_ids(vocabulary: int) -> tuple[int, ...]:
    """A fixed sequence by which two copies of a model are compared."""
    return tuple((7 * i + 3) % vocabulary for i in range(min(PROBE_LENGTH, 2 * vocabulary)))


def largest_gap(one: Sequence[float], two: Sequence[float]) -> float:
    """Between two lists of log-probs of the same tokens, nats."""
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


class Arrival:
    """Whether what was pushed arrived: another copy's log-probs of a fixed sequence against the student's,
    and against its own of before the push. Half precision rounds by more than one small step moves, so the
    second question is the one that finds a push that did nothing.

    Args:
        tolerance: largest gap, in nats, that rounding may explain.
        half: whether the copy holds its weights in half precision.
    """

    def __init__(self, *, tolerance: float, half: bool) -> None:
        self.tolerance, self.dtype = tolerance, torch.bfloat16 if half else torch.float32
        self._before: tuple[list[float], list[float], list[int]] | None = None

    def flaw(self, model: nn.Module, ids: tuple[int, ...], theirs: Sequence[float]) -> str:
        """What is wrong with the copy's log-probs of ids[1:] after a push; empty: nothing."""
        ours, sums = probe_logprobs(model, ids), rounded_sums(model, self.dtype)
        gap, before = largest_gap(theirs, ours), self._before
        if not gap <= self.tolerance:
            return f"differ from the student's by up to {gap:.3g} nats (allowed: {self.tolerance:g})"
        moved = before is not None and sums != before[2] and largest_gap(ours, before[0]) > _UNMOVED
        if before is not None and moved and largest_gap(theirs, before[1]) < _UNMOVED:
            return "did not change at all with the last push, though the student's did"
        self._before = (ours, list(theirs), sums)
        return ""


@torch.no_grad()
def rounded_sums(model: nn.Module, dtype: torch.dtype) -> list[int]:
    """Of each weight matrix, the sum of its bit patterns in a dtype: other weights, other sums."""
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    sums = [t.to(dtype).contiguous().view(bits).sum() for _, t in merged_weights(model)]
    return [int(v) for v in torch.stack(sums).cpu()]


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
