"""The weights that train, as other processes and engines take them: a checkpoint's names, adapters merged.

transformers renames and fuses tensors when it reads a checkpoint (a layer's experts become one), and undoes
it for all at once when it writes one. Other engines read checkpoints, and pass over names that are in none:
here it is undone for one tensor after the other, so that the largest is all that is held.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from onpath.engines.adapters import empty_weights, merged_weights
from onpath.engines.head import base_layer, own_logprobs, sharded, unwrapped
from onpath.engines.sharding import same_weights
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import make_directory, written

K = TypeVar("K")
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
PROBE_LENGTH = 16
_NOT_REVERTED = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What transformers' conversions raise of tensors that they were not made for."""
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
        take_part(model)
        return
    make_directory(directory)
    with written(directory / "model.safetensors") as temporary:
        write_stream(temporary, described(model), (t for _, t in checkpoint_weights(model)))
        unwrapped(model).config.save_pretrained(directory)


def take_part(model: nn.Module) -> None:
    """What a process does that keeps nothing, while another one goes through `checkpoint_weights`."""
    for _ in merged_weights(model) if sharded(model) else ():
        pass


def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as `save_pretrained` writes them, with LoRA's deltas added. Of a sharded model each is
    gathered in turn, and all processes take part.

    A tied output layer is given under both its names: vLLM on a CPU keeps a packed copy of it.
    """
    return _reverted(unwrapped(model), _together(model), merged_weights(model))


def described(model: nn.Module) -> dict[str, Tensor]:
    """Names, shapes and dtypes of `checkpoint_weights`, in its order; the tensors hold nothing."""
    return dict(_reverted(unwrapped(model), _together(model), empty_weights(model).items()))


def check_checkpoint(model: nn.Module, key: str) -> None:
    """Whether other engines can be given a model's weights.

    Raises:
        UserError: the weights cannot be given under a checkpoint's names; `key` names the model.
    """
    try:
        _together(model)
    except _NOT_REVERTED:
        raise UserError(
            f"{key}: the weights of {unwrapped(model).config.model_type} models cannot be given to a vLLM as "
            "their checkpoints have them, tensor by tensor; use rollout.engine hf"
        ) from None


def _reverted(
    inner: PreTrainedModel, together: Mapping[str, frozenset[str]], weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Each as soon as all that it is made of are there.

    Args:
        together: see `_together`; other weights are left out.
    """
    held: dict[frozenset[str], dict[str, Tensor]] = {}
    for name, tensor in weights:
        if name not in together:
            continue
        group = together[name]
        own = held.setdefault(group, {})
        own[name] = tensor
        if len(own) == len(group):
            yield from revert_weight_conversion(inner, held.pop(group)).items()


def _together(model: nn.Module) -> dict[str, frozenset[str]]:
    """Name of each weight that is saved → those with which it becomes the checkpoint's: itself alone, or all
    of the smallest module around it in which what a checkpoint fuses is whole.

    Nothing says which are fused, so it is tried, without values: right is what gives the names and shapes
    that all weights together give.

    Raises:
        _NOT_REVERTED: there is no such module within a layer, or transformers cannot do it at all.
    """
    inner, empty = unwrapped(model), empty_weights(model)
    names = _saved(model, empty)
    whole = _shapes(inner, {n: empty[n] for n in names})
    path = {n: n for n in names}  # of the module around it, at first its own
    while True:
        groups: dict[str, set[str]] = {}
        for name, around in path.items():
            groups.setdefault(around, set()).add(name)
        made = {around: _tried(inner, {n: empty[n] for n in own}) for around, own in groups.items()}
        wrong = [a for a, shapes in made.items() if shapes is None or not shapes.items() <= whole.items()]
        if not wrong:
            break
        # The widest last: it takes in those inside it.
        for wider in sorted({a.rpartition(".")[0] for a in wrong}, key=len, reverse=True):
            if not any(part.isdigit() for part in wider.split(".")):
                raise ValueError(f"{wrong[0]} is fused with what is outside its layer")
            path |= {n: wider for n in path if n.startswith(f"{wider}.")}
    if sorted(n for shapes in made.values() for n in shapes or ()) != sorted(whole):
        raise ValueError("a name is given twice, or not at all")
    return {n: frozenset(groups[around]) for n, around in path.items()}


def _saved(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those that `save_pretrained` keeps, of tied ones one; of a tied output layer both."""
    inner, first = unwrapped(model), same_weights(model)
    standing: dict[str, Tensor] = {}  # what is tied has one tensor, by which transformers knows it
    tensors = {n: standing.setdefault(first.get(n, n), torch.empty(1)) for n in names}
    kept = remove_tied_weights_from_state_dict(dict(tensors), inner)
    weight = base_layer(inner.get_output_embeddings()).weight
    head = {n.replace(".base_layer", "") for n, p in inner.named_parameters() if p is weight}
    unsaved = inner._keys_to_ignore_on_save or ()
    return [n for n in tensors if (n in kept or first.get(n, n) in head) and n not in unsaved]


def _shapes(inner: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {n: t.shape for n, t in revert_weight_conversion(inner, weights).items()}


def _tried(inner: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, torch.Size] | None:
    try:
        return _shapes(inner, weights)
    except _NOT_REVERTED:
        return None


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
        self,
        model: nn.Module,
        ids: tuple[int, ...],
        theirs: Mapping[K, Sequence[float]],
        pushed: Iterable[Tensor],
    ) -> tuple[K, str] | None:
        """The first copy whose log-probs of ids[1:] after a push are wrong, and how.

        Args:
            theirs: of each copy.
            pushed: the weights that it was given.
        """
        ours, sums = own_logprobs(model, ids).tolist(), rounded_sums(pushed, self.dtype)
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
def rounded_sums(weights: Iterable[Tensor], dtype: torch.dtype) -> list[int]:
    """Of each weight matrix, the sum of its bit patterns in a dtype: other weights, other sums."""
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    sums = [t.to(dtype).contiguous().view(bits).sum() for t in weights]
    return [int(v) for v in torch.stack(sums).cpu()]
