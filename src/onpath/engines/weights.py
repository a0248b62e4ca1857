"""The weights that train, as other processes and engines take them: Hugging Face names, adapters merged."""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from onpath.engines.adapters import described, merged_weights
from onpath.engines.head import sharded, unwrapped
from onpath.system import distributed
from onpath.system.files import make_directory, written

K = TypeVar("K")
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
PROBE_LENGTH = 16
_UNMOVED = 1e-6  # nats: one copy asked twice gives the same to the last digits


@torch.no_grad()
def save_weights(model: nn.Module, directory: Path, *, here: bool | None = None) -> None:
    """One safetensors file and the config, written aside and renamed: a reader never sees half of it. Tensors
    are gathered, merged and written one after the other: the largest of them is all that is held. Of a
    sharded model all processes take part.

    Args:
        here: whether this process writes; None: the first one does.

    Raises:
        UserError: the disk is full or not writable.
    """
    if not (distributed.rank() == 0 if here is None else here):
        for _ in merged_weights(model) if sharded(model) else ():
            pass
        return
    make_directory(directory)
    with written(directory / "model.safetensors") as temporary:
        write_stream(temporary, described(model), (t for _, t in merged_weights(model)))
        unwrapped(model).config.save_pretrained(directory)


def write_stream(path: Path, header: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """A safetensors file whose tensors come one after the other.

    Args:
        header: name → shape and dtype, in the order of `tensors`.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, like in header.items():
        begin, end = end, end + like.numel() * like.element_size()
        entries[name] = {
            "dtype": _DTYPES[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    assert path.stat().st_size == 8 + len(text) + end, "the tensors are not those of the header"


def probe_ids(vocabulary: int) -> tuple[int, ...]:
    """A fixed sequence by which two copies of a model are compared."""
    return tuple((7 * i + 3) % vocabulary for i in range(min(PROBE_LENGTH, 2 * vocabulary)))


def largest_gap(one: Sequence[float], two: Sequence[float]) -> float:
    """Between two lists of log-probs of the same tokens, nats."""
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


class Arrival(Generic[K]):
    """Whether what was pushed arrived: other copies' log-probs of a fixed sequence against the student's,
    and against their own of before the push. Half precision rounds by more than one small step moves, so the
    second question is the one that finds a push that did nothing.

    Args:
        tolerance: largest gap, in nats, that rounding may explain.
        half: whether the copies hold their weights in half precision.
    """

    def __init__(self, *, tolerance: float, half: bool) -> None:
        self.tolerance, self.dtype = tolerance, torch.bfloat16 if half else torch.float32
        self._before: tuple[list[float], dict[K, list[float]], list[int]] | None = None

    def flaw(
        self, model: nn.Module, ids: tuple[int, ...], theirs: Mapping[K, Sequence[float]]
    ) -> tuple[K, str] | None:
        """The first copy whose log-probs of ids[1:] after a push are wrong, and how.

        Args:
            theirs: of each copy.
        """
        ours, sums = probe_logprobs(model, ids), rounded_sums(model, self.dtype)
        before = self._before
        moved = before is not None and sums != before[2] and largest_gap(ours, before[0]) > _UNMOVED
        for copy, answers in theirs.items():
            gap = largest_gap(answers, ours)
            if not gap <= self.tolerance:
                allowed = f"(allowed: {self.tolerance:g})"
                return copy, f"differ from the student's by up to {gap:.3g} nats {allowed}"
            said = before[1].get(copy) if before is not None and moved else None
            if said is not None and largest_gap(answers, said) < _UNMOVED:
                return copy, "did not change at all with the last push, though the student's did"
        self._before = (ours, {copy: list(answers) for copy, answers in theirs.items()}, sums)
        return None


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
