"""Whether all processes of a run were given the same: one that trains on other options, data or models adds
its gradient all the same, and nothing would say so."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from onpath.config.changes import own_code
from onpath.config.sections import teacher_option
from onpath.config.whole import Config
from onpath.data.load import digest_prompts
from onpath.engines.adapters import is_adapter, own_base
from onpath.engines.models import locate
from onpath.run.environment import versions
from onpath.run.inputs import Prompts
from onpath.run.trained import Trained
from onpath.system import code, distributed
from onpath.system.errors import UserError
from onpath.system.files import place, unwritable

_SERVED = ("url", "timeout", "patience", "concurrency")
_OF_A_HOST = {
    *("student.device", "student.model", "data.train", "data.eval", "data.chat_template", "rollout.vllm"),
    *("run.dir", "run.threads", "parallel.timeout", *(f"rollout.{name}" for name in _SERVED)),
}
"""Options of which a process may have its own value: places, whose content is compared instead, and what a
machine or its network is like."""
_OF_A_HOSTS_TEACHER = {"device", "model", "cache", "cache_gb", *_SERVED}
_OF_A_MODEL = (".safetensors", ".json", ".jinja", ".model", ".py")
_NOT_OF_IT = ("trainer_state.json", "adapter_config.json")
"""The latter names its base by a place of the host's; the base is looked at itself."""
_ENDS = 2**20  # bytes at both ends of a file of weights that stand for it
_HIDDEN = 90.0  # seconds for which a file system of several hosts may hide a new file


def check_given(config: Config, prompts: Prompts, start: Trained | None) -> None:
    """Right after the processes have met, before a model is loaded. Every one must call.

    Args:
        start: what the student's model is, if a run has left it.

    Raises:
        UserError: a process has another option, version, data, model or code than the first; on all alike.
    """
    if distributed.world() == 1:
        return
    everyone = distributed.gather([dict(_given(config, prompts, start))])
    first = everyone[0]
    for number, other in enumerate(everyone[1:], start=2):
        who = f"process {number} of {len(everyone)}"
        for key in (*versions(), *sorted(k for k in {*first, *other} if k not in versions())):
            if key not in first or key not in other:  # a model that one host still has to download
                continue
            (what, one), (_, another) = first[key], other[key]
            if one == another:
                continue
            if what == "version":
                raise UserError(f"{who} runs {key} {another}, the first {one}; install the same everywhere")
            if what == "content":
                raise UserError(f"{who} has another content of {key} than the first; give all the same files")
            raise UserError(f"{who} has {key}: {another!r}, the first {one!r}; start all with one config")


def check_directory(directory: Path) -> None:
    """Whether all processes see the directory in which the first begins to write. Every one must call.

    Raises:
        UserError: one does not; on all alike.
    """
    if distributed.world() == 1:
        return
    mark = directory / distributed.first_decides(lambda: f".shared-{uuid.uuid4().hex}")
    distributed.first_decides(lambda: _touch(mark))
    missing = not _appears(mark)
    absent = distributed.gather([missing])
    if distributed.rank() == 0:
        with suppress(OSError):
            mark.unlink(missing_ok=True)
    if any(absent):
        raise UserError(
            f"run.dir: process {1 + absent.index(True)} of {len(absent)} does not see what the first writes "
            f"to {directory}; set run.dir to a directory that all of them share"
        )


def _given(config: Config, prompts: Prompts, start: Trained | None) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Key → what it is, and its value or its content's digest."""
    for name, version in versions().items():
        yield name, ("version", version)
    taught = {
        teacher_option(name): teacher.model_dump(mode="json") for name, teacher in config.taught_by.items()
    }
    for section, options in {
        **config.model_dump(mode="json", exclude={"teacher", "teachers"}),
        **taught,
    }.items():
        for option, value in options.items():
            of_a_host = (
                option in _OF_A_HOSTS_TEACHER if section in taught else f"{section}.{option}" in _OF_A_HOST
            )
            if not of_a_host:
                yield f"{section}.{option}", ("option", value)
    yield "data.train", ("content", digest_prompts(prompts.pool))
    yield "data.eval", ("option", [*prompts.evals])  # one after the other by all
    for split, some in prompts.evals.items():
        yield f"data.eval.{split}", ("content", digest_prompts(some))
    if config.data.chat_template is not None:
        text = place(config.data.chat_template, key="data.chat_template").read_bytes()
        yield "data.chat_template", ("content", hashlib.blake2b(text, digest_size=16).hexdigest())
    models = {"student.model": str(start.weights) if start else config.student.model}
    models |= {f"{teacher_option(name)}.model": teacher.model for name, teacher in config.taught_by.items()}
    for key, name in models.items():
        if (digest := _fingerprint(name)) is not None:
            yield key, ("content", digest)
    for key, digest in code.digests(own_code(config)).items():
        yield key, ("content", digest)


def _fingerprint(name: str) -> str | None:
    """Of a model: the hub's commit, or names, sizes and both ends of its files, since whole files of a large
    one take minutes; with an adapter its base's too. None: it is not here, or not readable, which loading
    will say."""
    where = locate(name)
    try:
        found = place(where) if where else Path()
        if found.is_dir():
            return _of_files(found)
        cached = try_to_load_from_cache(where, "config.json") if where.count("/") < 2 else None
    except (OSError, ValueError, UserError):
        return None
    return Path(cached).parent.name if isinstance(cached, str) else None


def _of_files(directory: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    files = (p for p in directory.iterdir() if p.suffix in _OF_A_MODEL and p.name not in _NOT_OF_IT)
    for path in sorted(p for p in files if p.is_file()):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_ENDS)
            file.seek(max(0, size - _ENDS))
            digest.update(json.dumps([path.name, size]).encode() + head + file.read(_ENDS))
    if is_adapter(directory):
        told = json.loads((directory / "adapter_config.json").read_text())
        base = own_base(directory) or told.pop("base_model_name_or_path", "")
        digest.update(json.dumps(told, sort_keys=True).encode() + str(_fingerprint(str(base))).encode())
    return digest.hexdigest()


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise unwritable(path, error) from None


def _appears(path: Path) -> bool:
    """Looks until it is there: opening a directory has a network's file system ask for it anew."""
    end = time.monotonic() + _HIDDEN
    while not os.path.exists(path) and time.monotonic() < end:
        for directory in (path.parent.parent, path.parent):
            with suppress(OSError):
                os.listdir(directory)
        time.sleep(0.2)
    return os.path.exists(path)
