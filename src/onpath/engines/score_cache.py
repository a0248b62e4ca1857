"""Teacher scores that are kept (`teacher.cache`): a response that comes again is not read again.

    in process    hidden states [n, H] of the response positions, half precision unless asked otherwise
    on a server   its likeliest tokens and their log-probs, [n, k], as they came

The key of an entry is a digest of all that it depends on: weights (a server: its name for them), context,
response, precision (a student that is its own teacher: also whether it reads under autocast), k. What a run
uses is always what the entry says, also the first time: so a run that is killed goes on exactly, whatever has
been kept by then. Entries lie in safetensors files, one per pass, with a digest each; a damaged one is
computed again. Runs, ranks and the arms of a study may share a directory; the files used longest ago go when
it becomes too large.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from onpath.data.batch import Batch, collate
from onpath.engines.decoding.branches import Past
from onpath.engines.head import unwrapped
from onpath.engines.remote.replay import address
from onpath.engines.sharding import digest_scales, digest_weights, is_whole
from onpath.engines.teacher import Teacher
from onpath.losses import Head, TeacherHidden, TeacherScores, TeacherTopK
from onpath.records import Trajectory
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import written
from onpath.system.streams import say

_NAMES = ("_name_or_path", "transformers_version", "dtype", "use_cache")
"""Entries of a model's config that say nothing about its scores (a weight's dtype is digested with it)."""
_LARGEST_HALF = 65_504.0
_NAME = re.compile(r"[0-9a-f]{24}")  # of a store's files
Entry = dict[str, Tensor]
"""Name → tensor of one response: `hidden`, or `ids`, `logp` and `sampled`."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a directory of scores holds."""

    files: int
    entries: int
    tokens: int
    bytes: int
    damaged: int
    """Files that are none."""
    removed: int = 0
    """Files that were removed before this was measured."""


class ScoreStore:
    """Entries by key, in files that processes share.

    Args:
        most: bytes that the files may have together.
    """

    def __init__(self, directory: Path, *, most: float) -> None:
        self.directory, self.most = directory, most
        self._places: dict[str, tuple[Path, list[str]]] = {}
        """Key → file, and the names of its tensors there."""
        self._seen: set[Path] = set()
        self._silent = False
        self.refresh()

    def refresh(self) -> None:
        """Finds what other processes have kept."""
        for path in sorted(_files(self.directory)):
            if path not in self._seen:
                self._seen.add(path)
                self._places = {**_places(path, _names(path) or ()), **self._places}

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry, as far as is known without reading it."""
        return key in self._places

    def get(self, key: str) -> Entry | None:
        """An entry, or None: it is not there, or not whole."""
        if key not in self._places:
            return None
        path, names = self._places[key]
        try:
            with safe_open(path, "pt") as file:
                said = (file.metadata() or {}).get(key)
                entry = {name.partition(".")[2]: file.get_tensor(name) for name in names}
            if said == _digest(entry):
                with suppress(OSError):
                    os.utime(path)  # used now: the last to go
                return entry
        except (OSError, SafetensorError, ValueError):
            pass
        del self._places[key]
        return None

    def put(self, entries: Mapping[str, Entry]) -> None:
        """Keeps entries in one file. A disk that takes no more is said once, and the run goes on without."""
        if not entries:
            return
        name = hashlib.blake2b("".join(sorted(entries)).encode(), digest_size=12).hexdigest()
        path = self.directory / f"{name}.safetensors"
        tensors = {f"{key}.{part}": t for key, entry in entries.items() for part, t in entry.items()}
        try:
            with written(path, also=(SafetensorError,)) as temporary:
                save_file(tensors, temporary, metadata={key: _digest(e) for key, e in entries.items()})
        except UserError as error:
            if not self._silent:
                say(f"teacher.cache: {error}; the run goes on, and keeps no more scores")
            self._silent = True
            return
        self._seen.add(path)
        self._places |= _places(path, tensors)
        prune(self.directory, most=self.most, spare=path)


def _places(path: Path, names: Iterable[str]) -> dict[str, tuple[Path, list[str]]]:
    found: dict[str, tuple[Path, list[str]]] = {}
    for name in names:
        found.setdefault(name.partition(".")[0], (path, []))[1].append(name)
    return found


def _files(directory: Path) -> list[Path]:
    """Those of a store: the directory may hold others, a model's weights for one."""
    return [p for p in directory.glob("*.safetensors") if _NAME.fullmatch(p.stem)]


def usage(directory: Path) -> Usage:
    """What is kept there."""
    files = sorted(_files(directory))
    entries, tokens, damaged = 0, 0, 0
    for path in files:
        names = _names(path)
        damaged += names is None
        entries += len({name.partition(".")[0] for name in names or ()})
        tokens += sum(size for name, size in (names or {}).items() if name.endswith((".hidden", ".ids")))
    size = sum(_size(path) for path in files)
    return Usage(files=len(files), entries=entries, tokens=tokens, bytes=size, damaged=damaged)


def prune(directory: Path, *, most: float, spare: Path | None = None, damaged: bool = False) -> int:
    """Removes the files used longest ago until all have at most `most` bytes together.

    Args:
        spare: is not removed.
        damaged: look into each file, and remove those that are none.

    Returns:
        How many files were removed.
    """
    found = []
    for path in _files(directory):
        with suppress(OSError):  # another process was faster
            about = path.stat()
            used = 0 if damaged and _names(path) is None else about.st_mtime_ns
            found.append((used, about.st_size, path))
    total, removed = sum(size for _, size, _ in found), 0
    for used, size, path in sorted(found):
        if path != spare and (total > most or used == 0):
            with suppress(OSError):
                path.unlink()
                total, removed = total - size, removed + 1
    return removed


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _names(path: Path) -> dict[str, int] | None:
    """Tensors of a file and their first sizes; None: it is damaged, or gone."""
    try:
        with safe_open(path, "pt") as file:
            return {name: int(file.get_slice(name).get_shape()[0]) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, IndexError):
        return None


def _digest(entry: Entry) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest_weights(digest, entry)
    return digest.hexdigest()


class CachedTeacher(Teacher):
    """A teacher whose weights stand still, asked once for each response.

    Args:
        teacher: scores what is not kept.
        weights: names its weights, and how they are run: their digest, or what a server calls them.
        dtype: of kept hidden states.
    """

    def __init__(self, teacher: Teacher, store: ScoreStore, *, weights: str, dtype: torch.dtype) -> None:
        self.teacher, self.store, self.weights, self.dtype = teacher, store, weights, dtype
        self.model, self.separate = teacher.model, teacher.separate
        self.context_length, self.spare = teacher.context_length, teacher.spare
        self._found = self._read = 0

    @property
    def head(self) -> Head | None:
        """See `Teacher.head`."""
        return self.teacher.head

    def past(self, batches: Sequence[Batch]) -> Past | None:
        """See `Teacher.past`."""
        return self.teacher.past(batches)

    def acting(self) -> AbstractContextManager[object]:
        """See `Teacher.acting`."""
        return self.teacher.acting()

    def scores(self, batch: Batch, cache: DynamicCache | None = None) -> TeacherScores | None:
        """See `Teacher.scores`. Keys and values for a continuation only a pass can give: it is made then."""
        keys = [self._key(t) for t in batch.trajectories]
        found = [self.store.get(key) for key in keys]
        lacking = [i for i, entry in enumerate(found) if entry is None]
        asked = lacking
        # A pass of a sharded model is an exchange, unless it is whole now: all processes make one or none.
        together = self.model is not None and not is_whole(self.model)
        if cache is not None or (together and distributed.anywhere(bool(lacking), batch.token_N.device)):
            asked = list(range(len(keys)))
        if asked:
            some = [batch.trajectories[i] for i in asked]
            part = batch if len(some) == len(keys) else collate(some, device=batch.token_N.device)
            entries = dict(zip(asked, self._entries(self.teacher.scores(part, cache), some), strict=True))
            self.store.put({keys[i]: entries[i] for i in lacking})
            found = [entries[i] if entry is None else entry for i, entry in enumerate(found)]
        read = sum(len(batch.trajectories[i].response) for i in asked)
        self._read, self._found = self._read + read, self._found + len(batch.token_N) - read
        return self._scores([entry for entry in found if entry is not None], batch.token_N.device)

    def expect(self, trajectories: Iterable[Trajectory]) -> None:
        """See `Teacher.expect`: what is kept is not asked for."""
        if self.model is None:  # one in this process begins with nothing
            self.teacher.expect([t for t in trajectories if self._key(t) not in self.store])

    def begun(self, trajectory: Trajectory) -> object:
        """See `Teacher.begun`."""
        return self.teacher.begun(trajectory)

    def take_over(self, trajectory: Trajectory, read: object) -> None:
        """See `Teacher.take_over`."""
        self.teacher.take_over(trajectory, read)

    def close(self) -> None:
        """See `Teacher.close`."""
        self.teacher.close()

    def measured(self) -> Mapping[str, float]:
        """See `Teacher.measured`."""
        counts = {"teacher_tokens_scored": self._read, "teacher_tokens_from_cache": self._found}
        self._read = self._found = 0
        return counts

    def follow(self) -> None:
        """See `Teacher.follow`."""
        self.teacher.follow()

    def _key(self, t: Trajectory) -> str:
        return address(self.weights, str(self.dtype), t.teacher_context, t.response)

    def _entries(self, scores: TeacherScores | None, trajectories: Sequence[Trajectory]) -> list[Entry]:
        """One per trajectory, as it is kept."""
        assert scores is not None, "a teacher that gives no scores is not asked for any"
        sizes = [len(t.response) for t in trajectories]
        if isinstance(scores, TeacherHidden):
            return [{"hidden": self._kept(rows)} for rows in scores.hidden.split(sizes)]
        assert isinstance(scores, TeacherTopK), "a mixture's teachers keep their own"
        assert scores.sampled_logp is not None
        parts = {"ids": scores.ids.int(), "logp": scores.logp, "sampled": scores.sampled_logp}
        split = {name: [p.cpu().contiguous() for p in whole.split(sizes)] for name, whole in parts.items()}
        return [{name: pieces[i] for name, pieces in split.items()} for i in range(len(sizes))]

    def _kept(self, hidden_nH: Tensor) -> Tensor:
        """In the asked precision; where half precision would overflow, as it is."""
        fits = self.dtype != torch.float16 or not bool((hidden_nH.abs() > _LARGEST_HALF).any())
        return hidden_nH.to("cpu", self.dtype if fits else hidden_nH.dtype).contiguous().clone()

    def _scores(self, entries: Sequence[Entry], device: torch.device) -> TeacherScores:
        """Of all trajectories of a batch."""
        whole = {name: torch.cat([e[name] for e in entries]).to(device) for name in entries[0]}
        if "hidden" not in whole:
            return TeacherTopK(ids=whole["ids"].long(), logp=whole["logp"], sampled_logp=whole["sampled"])
        assert self.model is not None
        assert self.head is not None
        return TeacherHidden(hidden=whole["hidden"].to(next(self.model.parameters()).dtype), head=self.head)


def scoring_digest(model: nn.Module) -> str:
    """Digest of what decides a teacher's scores: its weights, without those that train on top of them, and
    its config, by which the same weights say something else (RoPE, soft caps)."""
    config = {k: v for k, v in unwrapped(model).config.to_dict().items() if k not in _NAMES}
    told = f"{weights_digest(model, trained=False)} {json.dumps(config, sort_keys=True, default=str)}"
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module, *, trained: bool = True) -> str:
    """Digest of all parameters by name; of a sharded model all processes take part.

    Args:
        trained: with those that train; what adapters lie on has them beside it.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest_weights(digest, {n: w for n, w in model.named_parameters() if trained or not w.requires_grad})
    digest_scales(digest, model)
    return digest.hexdigest()
