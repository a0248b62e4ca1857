"""Exact resume: everything that a step depends on, written beside its place and then renamed.

Rollouts and data order are pure functions of (seed, step), so the state is small: trained weights, optimiser,
the method's own tensors, and the step. Tensors are safetensors, the rest JSON: nothing loaded here can run
code.

    step_N/state.json                  written last: the step, and a digest of every file
           model.safetensors           trained weights          ┐ sharded, each process writes its rows:
           optimizer.safetensors       exp_avg.<weight>, …      │ model-1-of-2.safetensors, …, where they lie
           method.safetensors          the method's own         ┘ in the whole stands in the file
           inputs.json

Any number of processes reads what any number has written.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from onpath.engines.head import sharded
from onpath.engines.sharding import local, rows_of
from onpath.engines.teacher import AVERAGE
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import half_written, sync_file, unwritable, written
from onpath.system.reading import read_json

_PREFIX = "step_"
_PARTS = ("model", "optimizer", "method")
_TOLD = "digests-of-process-"
_EXPECTED = "expected-of-process-"
"""Whoever cannot write its part removes it: that works on a full disk too."""
_ALL = "all"
_PLACES = "onpath.places"
"""In a file's metadata: name → its first row, and the shape of the whole."""


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
    timeout: float = 600.0,
    exchange: bool = True,
) -> "Saving":
    """Begins to write `root/step_N`, complete or not at all, while the run goes on.

    Args:
        root: the run's `checkpoints` directory.
        step: optimiser steps done.
        model: its parameters that require gradients are saved, by name.
        extra: the method's own tensors, such as a moving average.
        inputs: digests of what the run has read, by option.
        timeout: seconds that one process waits for the files of the others.
        exchange: False: processes can no longer speak with each other, and write all the same.

    All processes call it where the model is sharded, else the first one alone.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    target, shared = root / f"{_PREFIX}{step}", sharded(model)
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": _trained(model),
        "optimizer": _optimizer_tensors(model, optimizer),
        "method": extra,
    }
    copies = [_copied(part, tensors, suffix=_suffix() if shared else "") for part, tensors in parts.items()]
    whole = ExitStack()

    def begun() -> str:
        # One that is there was written before a crash that lost nothing else: a step has one state.
        what = f"the checkpoint of step {step}"
        by = "" if exchange else _ALL
        temporary = whole.enter_context(written(target, what=what, sync=True, also=(SafetensorError,), by=by))
        try:
            temporary.mkdir()
            for rank in range(1, distributed.world() if shared else 1):
                (temporary / f"{_EXPECTED}{rank}").touch()
        except OSError:
            with whole:  # which says it in a sentence
                raise
        return str(temporary)

    if shared and exchange:
        temporary = Path(distributed.first_decides(begun))
    elif distributed.rank() == 0:
        temporary = Path(begun())
    else:
        temporary = _begun_by_the_first(target, timeout)
    told = {"step": step, "inputs": dict(inputs or {})}
    return Saving(target, temporary, copies, whole, told=told, timeout=timeout)


def _begun_by_the_first(target: Path, patience: float) -> Path:
    """
    Raises:
        UserError: it has not been.
    """
    directory, end = half_written(target, _ALL), time.monotonic() + patience
    while not directory.is_dir():
        if time.monotonic() > end or target.is_dir():
            raise UserError(f"{target}: the first process does not write it")
        time.sleep(0.01)
    return directory


class Saving:
    """A checkpoint that a thread writes from copies; whoever changes the weights meanwhile does no harm.

    Processes do not speak: an exchange in the background would run into those of the step. Each leaves the
    digests of its files beside them, and the first one, when it has all, gives the directory its name.
    """

    def __init__(
        self,
        target: Path,
        temporary: Path,
        copies: "list[_Copy]",
        whole: ExitStack,
        *,
        told: Mapping[str, Any],
        timeout: float,
    ) -> None:
        self.target = target
        self._temporary, self._copies, self._whole, self._told = temporary, copies, whole, told
        self._patience = timeout
        self._error: BaseException | None = None
        self._rank, self._world = distributed.rank(), distributed.world() if copies[0].suffix else 1
        self._thread = threading.Thread(target=self._run, name=f"save {target.name}")
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it is there, or could not be written."""
        return not self._thread.is_alive()

    def wait(self, *, patience: float | None = None) -> Path:
        """Until it is there.

        Args:
            patience: seconds that other processes have, once this one's part is written, in place of the
                time-out.

        Raises:
            UserError: it could not be written; or whatever else befell the thread.
        """
        if patience is not None:
            self._patience = patience
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.target

    def wait_for_the_first(self, patience: float) -> None:
        """Until the first process has given the directory its name, or up: a launcher that sees one end early
        would end that one too."""
        end = time.monotonic() + patience
        while self._temporary.is_dir() and time.monotonic() < end:
            time.sleep(0.01)

    def _run(self) -> None:
        try:
            if self._rank == 0:
                with self._whole:
                    self._finish(self._write())
            else:
                self._tell(self._write())
        except (OSError, SafetensorError) as error:
            self._error = unwritable(self.target, error, what=f"the checkpoint of step {self._told['step']}")
        except BaseException as error:  # whoever waits gets it
            self._error = error
        if self._error is not None and self._rank > 0:
            if not self._temporary.exists():  # the first has given up, and says why
                self._error = None
                return
            with suppress(OSError, UserError):
                self._tell({"error": str(self._error)})
            with suppress(OSError):
                (self._temporary / f"{_EXPECTED}{self._rank}").unlink()

    def _write(self) -> dict[str, str]:
        """This process's rows of each part, on the disk; the files' digests."""
        digests = {}
        for copy in self._copies:
            path = self._temporary / f"{copy.part}{copy.suffix}.safetensors"
            save_file(copy.tensors, path, **({"metadata": copy.metadata} if copy.suffix else {}))
            sync_file(path)
            digests[path.name] = _digest(path)
        self._copies = []
        return digests

    def _tell(self, told: Mapping[str, str]) -> None:
        new = self._temporary / f".{_TOLD}{self._rank}"  # no `write_text`: it would make a directory anew
        new.write_text(json.dumps(told))
        new.replace(self._temporary / f"{_TOLD}{self._rank}")

    def _finish(self, digests: dict[str, str]) -> None:
        """Writes what says that all is there, once it is."""
        begun = time.monotonic()
        for rank in range(1, self._world):
            path, expected = (self._temporary / f"{name}{rank}" for name in (_TOLD, _EXPECTED))
            who = f"{self.target}: process {rank + 1} of {self._world}"
            while not path.exists():
                if not expected.exists() and not path.exists():
                    raise UserError(f"{who} cannot write its part, nor why; its disk may be full")
                if time.monotonic() - begun > self._patience:
                    raise UserError(f"{who} has not written its part")
                time.sleep(0.01)
            told = read_json(path, keys={})
            if "error" in told:
                raise UserError(told["error"])
            digests |= told
            path.unlink()
            expected.unlink()
        directory = self._temporary
        (directory / "inputs.json").write_text(json.dumps(self._told["inputs"], indent=1) + "\n")
        digests["inputs.json"] = _digest(directory / "inputs.json")
        state = {"step": self._told["step"], "blake2b": dict(sorted(digests.items()))}
        (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n")


def load(
    root: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Tensor]
) -> Loaded | None:
    """Restores the newest complete checkpoint in place; None if there is none. All processes call it.

    Damaged ones (a killed writer, a bad disk) are passed over and named in `Loaded.broken`.
    """
    found = distributed.first_decides(lambda: _newest(root))
    if found is None:
        return None
    load_weights(found.path, model)
    kept = _Stored(found.path, "method")
    # Earlier versions kept an average of what does not train as well.
    idle = {f"{AVERAGE}{name}" for name, p in model.named_parameters() if not p.requires_grad}
    shapes = {name: shape for name, shape in kept.shapes.items() if name not in idle}
    if shapes != {k: tuple(v.shape) for k, v in extra.items()}:
        if all(name.startswith("ahead.") for name in shapes.keys() ^ extra.keys()):
            was, now = ("off", "on") if shapes.keys() < extra.keys() else ("on", "off")
            raise UserError(
                f"{found.path}: rollout.overlap was {was} when this was saved, and is {now}; weights that "
                "write ahead are part of the state: set it as it was, or use another run.name"
            )
        raise UserError(f"{found.path}: holds the state of another method; use another run.name or remove it")
    for name, tensor in extra.items():
        kept.into(name, tensor)
    _restore_optimizer(model, optimizer, _Stored(found.path, "optimizer"))
    return found


def _newest(root: Path) -> Loaded | None:
    """The newest checkpoint that is whole.

    Raises:
        UserError: there are some, and none is.
    """
    broken: list[str] = []
    for path in reversed(list_steps(root)):
        if (state := _verified(path)) is not None:
            step = int(state["step"])
            return Loaded(step=step, path=path, broken=tuple(broken), inputs=inputs_of(path))
        broken.append(path.name)
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
    stored, trained = _Stored(path, "model"), _trained(model)
    if stored.shapes != {k: tuple(v.shape) for k, v in trained.items()}:
        raise UserError(
            f"{path}: holds other weights than this model trains; use another run.name or remove it"
        )
    for name, parameter in trained.items():
        stored.into(name, parameter)


def _suffix() -> str:
    return f"-{distributed.rank() + 1}-of-{distributed.world()}"


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """This process's rows of one part, in host memory."""

    part: str
    suffix: str
    """Of the file's name, where several processes write; empty: one process has whole tensors."""
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def _copied(part: str, tensors: Mapping[str, Tensor], *, suffix: str) -> _Copy:
    rows = {name: rows_of(tensor) for name, tensor in tensors.items()} if suffix else {}
    mine = {
        name: local(tensor.detach()).to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if name not in rows or rows[name].stores
    }
    places = {n: [rows[n].start, *rows[n].shape] for n in mine if n in rows}
    return _Copy(part=part, suffix=suffix, tensors=mine, metadata={_PLACES: json.dumps(places)})


class _Stored:
    """One part of a checkpoint, from the files of all processes that wrote it."""

    def __init__(self, directory: Path, part: str) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[Any, int, int]]] = {}
        """Name → open file, first row and the row after the last."""
        files = [directory / f"{part}.safetensors", *sorted(directory.glob(f"{part}-*-of-*.safetensors"))]
        for path in files:
            if not path.exists():
                continue
            file = safe_open(path, "pt")
            places = json.loads((file.metadata() or {}).get(_PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118  not a mapping
                shape = tuple(file.get_slice(name).get_shape())
                start, *whole = places.get(name, [0, *shape])
                self.shapes[name] = tuple(whole)
                stop = start + (shape[0] if shape else 1)
                self._pieces.setdefault(name, []).append((file, start, stop))

    @torch.no_grad()
    def into(self, name: str, tensor: Tensor) -> None:
        """This process's rows of a stored tensor, copied into its own."""
        own, rows = local(tensor), rows_of(tensor)
        for file, start, stop in self._pieces[name]:
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first >= last:
                continue
            if own.ndim == 0:
                own.copy_(file.get_tensor(name))
            else:
                found = file.get_slice(name)[first - start : last - start]
                own[first - rows.start : last - rows.start].copy_(found)


def holds_model(path: Path) -> bool:
    """Whether a directory is a saved model: a config and weights are in it, and none of them is cut off."""
    return has_model(path) and all(map(_opens, path.glob("*.safetensors")))


def has_model(path: Path) -> bool:
    """Whether a directory has the files of a saved model, whole or not."""
    configs = ("config.json", "adapter_config.json")
    return any((path / name).is_file() for name in configs) and any(path.glob("*.safetensors"))


def _opens(path: Path) -> bool:
    """Whether a file of weights has its header and is as long as that says."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def is_sound(path: Path) -> bool:
    """Whether every byte of a checkpoint is what was written."""
    return _verified(path) is not None


def inputs_of(path: Path) -> Mapping[str, str]:
    """What the run of a checkpoint had read when it was saved: option → digest; empty: it does not say."""
    found: dict[str, str] = read_json(path / "inputs.json", keys={})
    return found


def list_steps(root: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    found = [p for p in root.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written, by its directory's name."""
    return int(path.name.removeprefix(_PREFIX))


def prune(root: Path, *, keep: int, written: Path) -> None:
    """Removes all but the newest `keep` checkpoints up to the one just written: later ones were passed over
    as damaged, and count for nothing."""
    steps = list_steps(root)
    for path in steps[: steps.index(written) + 1][:-keep]:
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


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, stored: _Stored) -> None:
    trained = _trained(model)
    for key in stored.shapes:
        kind, _, name = key.partition(".")
        value = torch.zeros(()) if kind == "step" else torch.zeros_like(trained[name], requires_grad=False)
        stored.into(key, value)
        optimizer.state[trained[name]][kind] = value


def _verified(path: Path) -> dict[str, Any] | None:
    """The state, if every byte of the checkpoint is what was written."""
    try:
        state: dict[str, Any] = read_json(path / "state.json", keys={"step": int, "blake2b": dict})
        files = state["blake2b"]
        whole = state["step"] == step_of(path) and {*_named(files)} <= {*files}
        whole = whole and all(_digest(path / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return None
    return state if whole else None


def _named(files: Iterable[str]) -> list[str]:
    """The files that a checkpoint must have: of one process, or of as many as its files' names say."""
    written = next((n for n in files if n.startswith("model-")), "")
    count = int(written.removesuffix(".safetensors").rpartition("-")[2]) if written else 0
    endings = [f"-{rank + 1}-of-{count}" for rank in range(count)] or [""]
    return ["inputs.json", *(f"{part}{ending}.safetensors" for part in _PARTS for ending in endings)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
