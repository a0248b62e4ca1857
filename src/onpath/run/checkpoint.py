"""Exact resume: everything that a step depends on, written beside its place and then renamed.

Rollouts and data order are pure functions of (seed, step), so the state is small: trained weights, optimiser,
the method's own tensors, and the step. Tensors are safetensors, the rest JSON: nothing loaded here can run
code.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onpath.system.errors import UserError
from onpath.system.files import written
from onpath.system.reading import read_json

_PREFIX = "step_"
_FILES = ("model.safetensors", "optimizer.safetensors", "method.safetensors", "inputs.json")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint as read back."""

    step: int
    path: Path
    broken: tuple[str, ...]
    """Newer checkpoints that were found damaged and passed over."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What the run had read when it was saved: option → digest."""


def save(
    root: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor],
    inputs: Mapping[str, str] | None = None,
) -> Path:
    """Writes `root/step_N`, complete or not at all.

    Args:
        root: the run's `checkpoints` directory.
        step: optimiser steps done.
        model: its parameters that require gradients are saved, by name.
        extra: the method's own tensors, such as a moving average.
        inputs: digests of what the run has read, by option.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    target = root / f"{_PREFIX}{step}"
    # One that is there was written before a crash that lost nothing else: the same step gives the same state.
    with written(
        target, what=f"the checkpoint of step {step}", sync=True, also=(SafetensorError,)
    ) as temporary:
        temporary.mkdir()
        save_file(
            {k: p.detach().contiguous() for k, p in _trained(model).items()}, temporary / "model.safetensors"
        )
        save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        save_file({k: v.detach().contiguous() for k, v in extra.items()}, temporary / "method.safetensors")
        (temporary / "inputs.json").write_text(json.dumps(dict(inputs or {}), indent=1) + "\n")
        digests = {f.name: _digest(f) for f in sorted(temporary.iterdir())}
        (temporary / "state.json").write_text(json.dumps({"step": step, "blake2b": digests}, indent=1) + "\n")
    return target


def load(
    root: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Tensor]
) -> Loaded | None:
    """Restores the newest complete checkpoint in place; None if there is none.

    Damaged ones (a killed writer, a bad disk) are passed over and named in `Loaded.broken`.
    """
    broken: list[str] = []
    for path in reversed(list_steps(root)):
        state = _verified(path)
        if state is None:
            broken.append(path.name)
            continue
        load_weights(path, model)
        with torch.no_grad():
            kept = load_file(path / "method.safetensors")
            if {k: v.shape for k, v in kept.items()} != {k: v.shape for k, v in extra.items()}:
                raise UserError(
                    f"{path}: holds the state of another method; use another run.name or remove it"
                )
            for name, tensor in kept.items():
                extra[name].copy_(tensor)
        _restore_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))
        return Loaded(
            step=int(state["step"]),
            path=path,
            broken=tuple(broken),
            inputs=read_json(path / "inputs.json"),
        )
    if broken:
        raise UserError(
            f"{root}: none of its checkpoints is readable ({', '.join(broken)}); remove them to start from "
            f"step 0"
        )
    return None


def load_weights(path: Path, model: nn.Module) -> None:
    """The trained weights of one checkpoint, in place.

    Raises:
        UserError: it holds others than this model trains.
    """
    weights, trained = load_file(path / "model.safetensors"), _trained(model)
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in trained.items()}:
        raise UserError(
            f"{path}: holds other weights than this model trains; use another run.name or remove it"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def holds_model(path: Path) -> bool:
    """Whether a directory is a saved model: a config and weights are in it."""
    configs = ("config.json", "adapter_config.json")
    return any((path / name).is_file() for name in configs) and any(path.glob("*.safetensors"))


def is_sound(path: Path) -> bool:
    """Whether every byte of a checkpoint is what was written."""
    return _verified(path) is not None


def list_steps(root: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    found = [p for p in root.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def prune(root: Path, *, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for path in list_steps(root)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`exp_avg.<parameter>` and so on; scalars such as AdamW's step become 0-d tensors."""
    return {
        f"{kind}.{name}": torch.as_tensor(value).detach().contiguous()
        for name, p in _trained(model).items()
        for kind, value in optimizer.state.get(p, {}).items()
    }


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    trained = _trained(model)
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        parameter = trained[name]
        device = "cpu" if kind == "step" else parameter.device
        optimizer.state[parameter][kind] = value.to(device)


def _verified(path: Path) -> dict[str, Any] | None:
    """The state, if every byte of the checkpoint is what was written."""
    try:
        state: dict[str, Any] = read_json(path / "state.json", keys={"step": int, "blake2b": dict})
        whole = state["step"] == int(path.name.removeprefix(_PREFIX)) and all(
            _digest(path / name) == state["blake2b"][name] for name in _FILES
        )
    except (OSError, ValueError, KeyError):
        return None
    return state if whole else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
