"""Models in shards (torch's FSDP2): every process holds some rows of each weight, and of what belongs to it.

    rows     what a process holds for good: what the optimiser moves, and what a checkpoint stores
    pass     a sharded model gathers each layer when it runs and gives it back: all processes take part
    whole    inside `whole(model)` all weights are there: nothing waits for another process
    in step  inside `in_step(model)` processes may make different numbers of passes

Gradients are summed over processes, never averaged: losses divide by a global count. A unit is a decoder
layer, the output layer where it is not tied, and what is left: the causal LM, so that decoder, head and what
they share belong to one tree.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from onpath.config import Config
from onpath.engines import late
from onpath.engines.gloo import exchange_in_place
from onpath.engines.head import base_layer, decoder_of, sharded, unwrapped
from onpath.system import allocator, distributed
from onpath.system.errors import UserError


def asked(config: Config) -> bool:
    """Whether models are to be sharded: one process has nobody to share with."""
    return config.parallel.shard != "none" and distributed.world() > 1


def layout(config: Config) -> tuple[int, int]:
    """Copies of a sharded model, and the processes that share one.

    Raises:
        UserError: the processes cannot be divided so.
    """
    world, hosts = distributed.world(), config.parallel.hosts
    copies = max(1, world // distributed.local_world()) if hosts == "auto" else hosts
    if world % copies:
        raise UserError(
            f"parallel.hosts is {copies}, which does not divide {world} processes; use auto, or a divisor"
        )
    return copies, world // copies


def make_mesh(config: Config, device: torch.device) -> DeviceMesh:
    """Processes as copies × shards: of `parallel.hosts: auto`, shards inside a host and copies across.

    Raises:
        UserError: see `layout`.
    """
    copies, shards = layout(config)
    with distributed.connecting():
        return init_device_mesh(device.type, (copies, shards), mesh_dim_names=("copies", "shards"))


def shard(model: nn.Module, mesh: DeviceMesh, *, device: torch.device, half: bool = False) -> None:
    """Leaves this process its rows of each weight, in place; the model may lie in host memory until then.

    Args:
        half: gather weights in bfloat16; rows, gradients and their sums stay in the weights' own dtype.

    Raises:
        UserError: a model whose layers cannot be told apart.
    """
    inner = unwrapped(model)
    layers = _layers(inner)
    mesh = mesh if mesh.size(0) > 1 else mesh["shards"]
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,
        ),
    }
    head, dtype = inner.get_output_embeddings(), late.waits(model)
    tied = base_layer(head).weight is base_layer(inner.get_input_embeddings()).weight
    for unit in layers if tied else [*layers, head]:
        late.cast(unit, dtype)
        fully_shard(unit, **options)
    late.cast(inner, dtype)
    fully_shard(inner, **options, reshard_after_forward=False)
    nn.Module.to(model, device)  # buffers; the rows are there
    inner.read = MethodType(_read, inner)  # type: ignore[assignment]
    register_fsdp_forward_method(inner, "read")
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
        if dist.get_backend(mesh.get_group(mesh.ndim - 1)) == "gloo":
            exchange_in_place(unit)


def place(
    config: Config,
    device: torch.device,
    *,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    frozen: nn.Module | None,
) -> None:
    """Shards what `parallel` asks for, and brings the rest from host memory to the device.

    Args:
        teachers: those in this process; one may be the student.
        frozen: a copy of the student that samples by itself (rollout.overlap): it waits for nobody.
    """
    mesh = make_mesh(config, device)
    shard(student, mesh, device=device, half=config.optim.bf16)
    for teacher in teachers:
        if sharded(teacher):
            continue
        if config.parallel.teacher == "same":
            shard(teacher, mesh, device=device)
        else:
            late.whole(teacher)
        if config.parallel.teacher != "offload":  # those come when they are asked for
            nn.Module.to(teacher, device)
    if frozen is not None:
        nn.Module.to(late.whole(frozen), device)
    allocator.give_back()


def _layers(inner: Any) -> Sequence[nn.Module]:
    found = getattr(decoder_of(inner), "layers", None)
    if not isinstance(found, nn.ModuleList) or not len(found):
        kind = inner.config.model_type
        raise UserError(
            f"parallel.shard: the layers of {kind} models are not where they are looked for (layers); "
            "use parallel.shard: none"
        )
    return list(found)


def _read(self: Any, **inputs: Any) -> Any:
    """The decoder alone, through the root's hooks: a pass that does not form logits."""
    return decoder_of(self)(**inputs)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [m for m in unwrapped(model).modules() if isinstance(m, FSDPModule)]


def give_back(*models: nn.Module | None) -> None:
    """Parameters are this process's rows again: a pass without gradients leaves the root's whole."""
    for model in models:
        for unit in _units(model) if model is not None and sharded(model) else ():
            unit.reshard()


@contextlib.contextmanager
def whole(*models: nn.Module | None) -> Iterator[None]:
    """All weights of these models on every process. All processes must enter, and leave; in between none
    waits. A model that is not sharded, or is whole already, is left as it is."""
    found = {id(unwrapped(m)): m for m in models if m is not None}  # a teacher may be the student
    mine = [m for m in found.values() if not is_whole(m)]
    with torch.inference_mode(False):  # what is gathered inside it could not be trained on
        for model in mine:
            root: Any = unwrapped(model)
            for work in [unit.unshard(async_op=True) for unit in _units(model)]:
                if work is not None:
                    work.wait()
            root.set_reshard_after_forward(False)
            root.set_reshard_after_backward(False)
            root.onpath_whole = True
    try:
        yield
    finally:
        for model in mine:
            root = unwrapped(model)
            root.onpath_whole = False
            for unit in _units(model):
                unit.set_reshard_after_forward(unit is not root, recurse=False)
                unit.set_reshard_after_backward(True, recurse=False)
                unit.reshard()


@contextlib.contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Around what processes sample from a model that stays in its shards. A pass gathers one layer after the
    other, and who has made all of its own makes passes of one token while another has any left. All processes
    must enter and leave. In inference mode: what is gathered here could not be trained on."""
    if is_whole(model):
        yield
        return
    root: Any = unwrapped(model)
    device = next(model.parameters()).device

    def another(*_: object) -> None:
        distributed.anywhere(True, device)

    # Before FSDP2's own hook, which gathers: all processes must exchange in one order.
    hook, root.onpath_in_step = root.register_forward_pre_hook(another, prepend=True), True
    try:
        yield
    finally:
        root.onpath_in_step = False
        hook.remove()
    with torch.inference_mode():
        one = torch.zeros(1, 1, dtype=torch.long, device=device)
        while distributed.anywhere(False, device):
            root(input_ids=one)


def can_sample(model: nn.Module) -> bool:
    """Whether processes may make passes of this model as each one likes."""
    return is_whole(model) or bool(getattr(unwrapped(model), "onpath_in_step", False))


def is_whole(model: nn.Module) -> bool:
    """Whether passes of this model wait for no other process."""
    return not sharded(model) or bool(getattr(unwrapped(model), "onpath_whole", False))


def sum_now(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums its gradients over processes, with what was kept before it."""
    if sharded(model):
        root: Any = unwrapped(model)
        root.set_requires_gradient_sync(now)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor. All processes take part if it is sharded.

    Over gloo each sends its rows in turn to where they belong: gathered all at once they would be held twice.
    No gradients.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    group = mesh.get_group(mesh.ndim - 1)
    rows = tensor.placements[-1].is_shard(0) and all(p.is_replicate() for p in tensor.placements[:-1])
    if not rows or dist.get_backend(group) != "gloo":
        return tensor.full_tensor()
    mine = tensor.to_local()
    whole = torch.empty(shape, dtype=mine.dtype, device=mine.device)
    for process in range(mesh.size(mesh.ndim - 1)):
        start, stop = _rows(shape, mesh, process)
        part = whole[start:stop]
        if process == group.rank():
            part.copy_(mine)
        if len(part):
            dist.broadcast(part, src=dist.get_global_rank(group, process), group=group)
    return whole


def raw(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a whole tensor, of a quantised one those of its parts. All processes take part if it is
    sharded."""
    whole = full(tensor.detach())
    if is_traceable_wrapper_subclass(whole):
        parts, _ = whole.__tensor_flatten__()
        for part in parts:
            yield from raw(getattr(whole, part))
        return
    yield whole.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def digest_weights(digest: Any, weights: Mapping[str, Tensor]) -> None:
    """Updates a `hashlib` digest with named tensors: names, shapes, dtypes, bytes. See `raw`."""
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in raw(weight):
            digest.update(part)


def digest_scales(digest: Any, model: nn.Module) -> None:
    """Updates it with how strongly frozen adapters act, which is no weight."""
    for name, layer in model.named_modules():
        frozen = not any(p.requires_grad for p in layer.parameters())
        if isinstance(layer, LoraLayer) and frozen:
            digest.update(f"{name} {sorted(layer.scaling.items())}".encode())


def local(tensor: Tensor) -> Tensor:
    """This process's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which part of a tensor this process holds, along its first dimension."""

    start: int
    stop: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    stores: bool
    """Whether this process writes them into a checkpoint: of copies, and of what all have, one does."""


def rows_of(tensor: Tensor) -> Rows:
    """Where this process's rows lie in the whole."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Rows(start=0, stop=shape[0] if shape else 1, shape=shape, stores=distributed.rank() == 0)
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    assert place is not None
    start, stop = _rows(shape, mesh, place[-1])
    return Rows(start=start, stop=stop, shape=shape, stores=all(i == 0 for i in place[:-1]))


def own_rows(tensor: Tensor, whole: Tensor) -> Tensor:
    """Of a whole tensor of the same shape what this process holds of `tensor`."""
    rows = rows_of(tensor)
    return whole[rows.start : rows.stop] if whole.dim() else whole


def _rows(shape: tuple[int, ...], mesh: DeviceMesh, process: int) -> tuple[int, int]:
    each = -(-shape[0] // mesh.size(mesh.ndim - 1))  # as torch.chunk has it
    return min(process * each, shape[0]), min((process + 1) * each, shape[0])


@torch.no_grad()
def gathered(tensors: Iterable[tuple[str, Tensor]], same: Mapping[str, str]) -> dict[str, Tensor]:
    """Whole tensors in the first process's host memory, gathered one after the other; nothing on the others.
    All processes take part.

    Args:
        same: see `same_weights`.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if (first := same.get(name)) is None:
            one = full(tensor)
            found |= {name: one.cpu()} if distributed.rank() == 0 else {}
        elif distributed.rank() == 0:
            found[name] = found[first]
    return found


def same_weights(model: nn.Module) -> dict[str, str]:
    """Each further name of a parameter → its first one, by the names of the model without adapters."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer", "")
        if first.setdefault(id(parameter), plain) != plain:
            found[plain] = first[id(parameter)]
    return found
