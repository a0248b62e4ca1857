"""A run's directory claimed: begun, or gone on with if what is there belongs to this config."""

import json
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from onpath import config as configuration
from onpath.config.changes import Change, changes
from onpath.config.whole import Config
from onpath.engines.head import sharded
from onpath.run import checkpoint
from onpath.run.alike import check_directory
from onpath.run.contents import digests
from onpath.run.directory import Run
from onpath.run.environment import environment
from onpath.run.inputs import CLOCK_FILE
from onpath.run.log import TRACKER_ID, JsonLines, check_trackers, open_trackers
from onpath.run.parts import Parts
from onpath.run.refresh import DIRECTORY as ROLLOUTS
from onpath.run.refresh import Refreshed, forget_phases
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import lock, remove_leftovers, write_text
from onpath.system.reading import read_yaml

_NAMED = 5
"""Keys that a refusal names."""
_OF_A_START = ("environment.json", "refine.json", TRACKER_ID)
"""Files of a run that was refused before its first step; another config writes its own."""
_STARTS = "environment.jsonl"
"""A line for each start."""
_OF_RUNS = (_STARTS, "metrics.jsonl")
"""A directory that has one is a run's."""
_ASIDE = ("cache", "probes")
"""What `onpath inspect --probe` of a config leaves where its run will be."""
_LAUNCHERS = (".log", ".out", ".err")
"""Names of files that a shell or a batch system writes a run's output to end so."""


def open_run(config: Config, parts: Parts, *, with_changes: bool = False) -> Run:
    """Makes the run's directory, or checks that the one there belongs to this config.

    Args:
        with_changes: go on with it even if options have changed that may not, or what they name.

    Raises:
        UserError: it belongs to another config (the first differing key is named), holds files that no run
            wrote, or cannot be written.
    """
    directory = Path(config.run.dir) / config.run.name
    check_trackers(config.run.trackers)
    held: list[int] = []

    def prepared() -> tuple[tuple[Change, ...], str]:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {directory}: {error.strerror or error}") from None
        held.append(lock(directory))
        failed.callback(os.close, held[0])
        return _prepare(directory, config, parts, with_changes=with_changes)

    with ExitStack() as failed:  # whoever tries again in this process finds the directory free
        changed, note = distributed.first_decides(prepared)
        check_directory(directory)
        run = Run(
            directory=directory,
            parts=parts,
            metrics=JsonLines(directory / "metrics.jsonl"),
            evals=JsonLines(directory / "eval.jsonl"),
            changes=changed,
            with_changes=with_changes,
            held=held[0] if held else None,
        )
        failed.pop_all()
        failed.callback(run.close)
        run.note(note)
        run.reopened = distributed.first_decides(run.reopens)
        finished = distributed.first_decides(lambda: run.finished)
        if distributed.rank() == 0 or sharded(parts.models.student):
            run.inputs = digests(parts)
        if finished:
            distributed.first_decides(run.check_made_of)
        if not finished and distributed.rank() == 0:
            run.trackers = open_trackers(
                config.run.trackers,
                directory=directory,
                name=config.run.name,
                config=config.model_dump(mode="json"),
            )
        failed.pop_all()
    return run


def _prepare(
    directory: Path, config: Config, parts: Parts, *, with_changes: bool
) -> tuple[tuple[Change, ...], str]:
    """Makes the directory this config's, and writes what a start leaves there.

    Returns:
        What has changed since the run there was begun, and what to say of one that had not begun.
    """
    try:
        if (foreign := _foreign(directory, config)) is not None:
            raise UserError(
                f"{directory} holds {foreign}, which no run of onpath wrote; choose another run.name or "
                "run.dir"
            )
        found: tuple[Change, ...] = ()
        note = ""
        if (directory / "config.yaml").exists() and _begun(directory):
            found = _claim(directory, config, parts.refreshed, with_changes=with_changes)
        else:
            note = _begin(directory, config)
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {directory}: {error.strerror or error}") from None
    if _is_a_runs(directory):
        remove_leftovers(directory)
    if (clock := parts.text.renderer.clock) is not None:
        write_text(directory / CLOCK_FILE, clock.isoformat() + "\n")
    about = environment(parts)
    if not (directory / "environment.json").exists():
        write_text(directory / "environment.json", json.dumps(about, indent=1) + "\n")
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    JsonLines(directory / _STARTS).write({"started": started, **about})
    return found, note


def _is_a_runs(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _OF_RUNS)


def _foreign(directory: Path, config: Config) -> str | None:
    """The first file or directory that lay there before any run; None: nothing is in the way."""
    if _is_a_runs(directory):
        return None
    own = [*_ASIDE, CLOCK_FILE]  # a moment may be given
    path = directory / "config.yaml"
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == config.to_yaml():
        own += ["config.yaml", "environment.json"]  # of a run that was killed while it started
    others = (p for p in sorted(directory.iterdir()) if p.name not in own and not p.name.startswith("."))
    return next((p.name for p in others if not (p.suffix in _LAUNCHERS and p.is_file())), None)


def _claim(
    directory: Path, config: Config, refreshed: Refreshed | None, *, with_changes: bool
) -> tuple[Change, ...]:
    """What has changed since the run there was begun."""
    found = changes(configuration.resolved(_read(directory / "config.yaml")), config)
    refused = [change for change in found if not change.allowed]
    if refused and not with_changes:
        renamed = [change for change in refused if change.key == "method.name"]
        if renamed:  # its options follow from it
            refused = renamed + [change for change in refused if not change.key.startswith("method.")]
        told = [f"{c.key}: {c.before!r} there, {c.after!r} here" for c in refused[:_NAMED]]
        more = f", and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
        raise UserError(
            f"{directory} belongs to a run with another config ({'; '.join(told)}{more}); choose another "
            "run.name or remove it (or go on all the same with --resume-with-changes)"
        )
    for change in found:
        if change.key == "optim.steps" and refreshed is not None:
            refreshed.check_longer(change.before)
    return tuple(found)


def _begin(directory: Path, config: Config) -> str:
    """A run that was refused before its first step has not begun: the config writes its own files. Of a first
    phase that was being made what there is stays, unless an option has changed on which it may depend.

    Returns:
        What to say of it.
    """
    path, changed, note = directory / "config.yaml", ["config.yaml"], ""
    with suppress(UserError):  # without it, or damaged: nothing says what the phase is of
        found = changes(configuration.resolved(_read(path)), config)
        changed = [change.key for change in found if not change.allowed]
    if changed and forget_phases(directory / ROLLOUTS, 0):
        note = f"rollouts of the run that had not begun are made anew: {', '.join(changed[:_NAMED])} changed"
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != config.to_yaml():
        for name in _OF_A_START:
            (directory / name).unlink(missing_ok=True)
    write_text(path, config.to_yaml())
    return note


def _begun(directory: Path) -> bool:
    """Whether a run has done anything there: one that was refused before its first step has not."""
    lines = (directory / name for name in ("metrics.jsonl", "eval.jsonl"))
    if any(path.is_file() and path.stat().st_size for path in lines):
        return True
    return (directory / "model").is_dir() or bool(checkpoint.list_steps(directory / "checkpoints"))


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path)
    except UserError:
        tree = None
    if not isinstance(tree, dict) or not all(isinstance(options, dict) for options in tree.values()):
        raise UserError(f"{path}: damaged; choose another run.name or remove the directory")
    return tree
