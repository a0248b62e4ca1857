"""What a study's config names and does not hold: data, models, own code. Opened before anything runs, and the
same as when it began.

<study>/sources.json     name → digest of what it stood for when the study began
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from onpath.commands.study import plan
from onpath.commands.study.config import StudyConfig
from onpath.config.changes import own_code
from onpath.config.whole import Config
from onpath.data.load import LoadedPrompts, load_prompts
from onpath.engines.adapters import is_adapter
from onpath.engines.models import locate, model_directory
from onpath.grade.code import refuses
from onpath.records import Prompt
from onpath.run.inputs import load_evals
from onpath.run.trained import find
from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.files import place, write_text
from onpath.system.reading import read_json

_OF_MODELS = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
"""Ends of the files that decide what a model or its tokenizer does: not a card, nor logs beside it."""


def check_sources(study: StudyConfig) -> None:
    """Opens all data once, as a run does, so that none is missed when half of the runs are done; of a study
    with nothing left to run it may be gone.

    Raises:
        UserError: a source cannot be read, an evaluation set has no answers, or tune.split is not apart.
    """
    if not any(map(plan.left, plan.stages(study)[-1])):
        return
    config = plan.arm_config(study, study.base_arm)
    data = config.data
    trained = load_prompts(
        data.train,
        limit=data.limit,
        skip_bad=data.skip_bad,
        columns=data.columns,
        refuses=refuses(config.eval.grader),
    )
    compared = load_evals(config)
    for job in plan.tuning(study, dict.fromkeys(study.trained, 1))[:1]:
        tuned_on = load_evals(job.config)[plan.TUNING_SPLIT]
        _check_apart(tuned_on, trained, "on which arms are trained")
        for name, others in compared.items():
            _check_apart(tuned_on, others, f"on which arms are compared ({name})")


def _check_apart(tuned_on: LoadedPrompts, others: LoadedPrompts, used: str) -> None:
    """Rates must be chosen on problems of their own, whatever the sources are called."""
    known = {_asked(prompt) for prompt in others.prompts}
    both = [prompt.id for prompt in tuned_on.prompts if _asked(prompt) in known]
    if both:
        many = f"{len(both)} of its {len(tuned_on.prompts)} problems"
        raise UserError(
            f"tune.split {tuned_on.source}: {many}, the first with id {both[0]!r}, are also in "
            f"{others.source}, {used}; tune on a split of its own"
        )


def _asked(prompt: Prompt) -> tuple[str, ...]:
    """What is said in a prompt, however it is given."""
    said = [m["content"] for m in prompt.messages or () if m["role"] != "system"] or [prompt.question]
    return tuple(text.strip() for text in said)


def claim(study: StudyConfig) -> None:
    """Writes what the study's names stand for.

    Raises:
        UserError: one of them stood for something else when its first run began.
    """
    path, now = study.directory / "sources.json", digests(study)
    before = read_json(path, keys={}) if path.is_file() and _begun(study.directory) else {}
    places = {_placed(source): digest for source, digest in before.items()}
    for source, digest in now.items():
        if before.get(source, places.get(_placed(source), digest)) != digest:
            raise UserError(
                f"{source} has changed since the study in {study.directory} began: its runs would not be "
                "comparable; give the study another name"
            )
    write_text(path, json.dumps(before | now, indent=1) + "\n")


def _begun(directory: Path) -> bool:
    """Whether a run has done anything: until then what is wrong with a source may be mended."""
    files = (file for name in ("metrics.jsonl", "eval.jsonl") for file in directory.glob(f"*/*/{name}"))
    return any(file.stat().st_size for file in files)


def _placed(source: str) -> str:
    """A name as it is from the root, however it is spelled."""
    return os.path.abspath(os.path.expanduser(source))


def digests(study: StudyConfig) -> dict[str, str]:
    """Name → digest of each data file and directory, chat template, model on this machine, and own code.

    Raises:
        UserError: one of the files cannot be read.
    """
    configs = [plan.arm_config(study, arm) for arm in study.arms]
    data = plan.arm_config(study, study.base_arm).data
    found: dict[str, str] = {}
    sources = [data.train, *data.eval.values(), *([study.tune.split] if study.tune else [])]
    for source in dict.fromkeys(sources):
        if files := list(_of_data(source)):
            found[source] = _digest(files)
    if data.chat_template is not None and (template := place(data.chat_template)).is_file():
        found[data.chat_template] = _digest([template])
    for model in dict.fromkeys(name for config in configs for name in _models(config)):
        found |= {name: _digest(files) for name, files in _of_model(model)}
    own = {name for config in configs for name in own_code(config).values()}
    own |= {source for source in sources if code.is_own(source)}
    return found | code.digests({name: name for name in sorted(own)})


def _of_data(source: str) -> Iterator[Path]:
    """Files of a source: itself, or the tables of a directory of `datasets`, of its split alone if it names
    one. What `datasets` keeps for itself beside them is no data."""
    base, _, split = source.rpartition(":")
    path = place(source)
    if path.is_file():
        yield path
        return
    if not path.is_dir() and base and place(base).is_dir():
        path = place(base) / split if (place(base) / split).is_dir() else place(base)
    if path.is_dir():
        yield from (p for p in sorted(path.rglob("*.arrow")) if not p.name.startswith("cache-"))


def _models(config: Config) -> Iterator[str]:
    """Names of the models that a run loads; those that a server has alone are not seen."""
    yield config.student.model
    for teacher in config.taught_by.values() if not config.method.self_taught else ():
        if teacher.engine != "chat":
            yield teacher.model


def _of_model(name: str) -> Iterator[tuple[str, list[Path]]]:
    """Name and files of a model in a directory, and of what it adapts, if it is an adapter."""
    with suppress(UserError):  # whatever is wrong with it, its run will say
        where = place(locate(name))
        trained = find(where)
        where = where if trained is None else trained.weights
        if where.is_dir():
            yield name, _parts(where)
        if is_adapter(where) and (base := place(model_directory(str(where), name))).is_dir():
            yield str(base), _parts(base)


def _parts(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.suffix in _OF_MODELS and p.is_file())


def _digest(files: Iterable[Path]) -> str:
    """Of one file, or of several by their names."""
    known = [(file.name, _of_file(file)) for file in files]
    return known[0][1] if len(known) == 1 else hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _of_file(path: Path) -> str:
    try:
        about = path.stat()
        return _read(path, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


@cache
def _read(path: Path, size: int, changed: int) -> str:
    """About a second per GB, once for all studies of a command."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
