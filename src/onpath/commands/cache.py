"""`onpath cache`: what is kept of teachers and students, looked at and made smaller: a directory of scores
(`teacher.cache`), or the rollouts of a run (`rollout.refresh`)."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from onpath.engines.score_cache import Usage, prune, usage
from onpath.run.checkpoint import list_steps, step_of
from onpath.run.refresh import DIRECTORY, first_step, list_phases, rollouts_in
from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.files import place


def kept_scores(directory: str | Path, *, keep_gb: float | None = None) -> Usage:
    """What a directory of scores holds, after it was made smaller if that is asked.

    Args:
        keep_gb: bytes ÷ 10⁹ that may stay: files used longest ago go first, damaged ones always; None removes
            nothing.

    Raises:
        UserError: there is no such directory, it holds other things and no scores, or `keep_gb` is below 0.
    """
    code.not_while_loading("onpath.kept_scores")
    path = place(directory)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; it is what teacher.cache names, or a run's")
    found = usage(path)
    if not found.files and any(path.iterdir()):
        raise UserError(
            f"{path}: no scores are kept there, but other files; name what teacher.cache names, or a run of "
            "rollout.refresh"
        )
    if keep_gb is None:
        return found
    removed = prune(path, most=_bytes(keep_gb), damaged=True)
    return replace(usage(path), removed=removed)


@dataclass(frozen=True, kw_only=True)
class KeptRollouts:
    """What a run keeps of its students."""

    phases: int
    rollouts: int
    tokens: int
    bytes: int
    removed: int = 0
    """Phases that were removed before this was measured."""


def keeps_rollouts(directory: str | Path) -> bool:
    """Whether this is a run, finished or not, that keeps rollouts."""
    return bool(list_phases(place(directory) / DIRECTORY))


def kept_rollouts(directory: str | Path, *, keep_gb: float | None = None) -> KeptRollouts:
    """What a run of `rollout.refresh` holds, after it was made smaller if that is asked.

    Args:
        keep_gb: bytes ÷ 10⁹ that may stay: the oldest phases go first, but none that the run would read if it
            went on from one of its checkpoints: the weights that wrote it are gone. None removes nothing.

    Raises:
        UserError: the run keeps none, or `keep_gb` is below 0.
    """
    run = place(directory)
    phases = list_phases(run / DIRECTORY)
    if not phases:
        raise UserError(
            f"{run}: no rollouts are kept there; name the directory of a run with rollout.refresh"
        )
    removed = 0
    if keep_gb is not None:
        most, sizes = _bytes(keep_gb), {phase: _size(phase) for phase in phases}
        saved = list_steps(run / "checkpoints")
        oldest = step_of(saved[0]) if saved else 0
        read = max((p for p in phases if first_step(p) <= oldest), key=first_step, default=phases[0])
        for phase in [p for p in phases if first_step(p) < first_step(read)]:
            if sum(sizes.values()) > most:
                shutil.rmtree(phase)
                del sizes[phase]
                removed += 1
        phases = list(sizes)
    counts = [rollouts_in(phase) for phase in phases]
    return KeptRollouts(
        phases=len(phases),
        rollouts=sum(n for n, _ in counts),
        tokens=sum(tokens for _, tokens in counts),
        bytes=sum(map(_size, phases)),
        removed=removed,
    )


def told(directory: str | None, *, keep_gb: float | None = None) -> list[str]:
    """What is kept in a directory, a line; None: in each run in `runs` that keeps rollouts.

    Raises:
        UserError: see `kept_scores` and `kept_rollouts`; or nothing was named, and there is no such run, or
            something is to be removed.
    """
    if directory is not None:
        of = _rollouts if keeps_rollouts(directory) else _scores
        return [of(directory, keep_gb)]
    if keep_gb is not None:
        raise UserError("--keep-gb needs a DIRECTORY: a run, or what teacher.cache names")
    found = [p for p in sorted(Path("runs").glob("*")) if keeps_rollouts(p)]
    if not found:
        raise UserError("no run in runs keeps rollouts (rollout.refresh); name what teacher.cache names")
    return [_rollouts(path, None) for path in found]


def _scores(directory: str, keep_gb: float | None) -> str:
    found = kept_scores(directory, keep_gb=keep_gb)
    return (
        f"{directory}: scores of {found.entries:,} responses, {found.tokens:,} tokens, in "
        f"{found.files:,} files of {found.bytes / 1e9:,.3f} GB"
        + (f"; {found.damaged:,} damaged files" if found.damaged else "")
        + (f"; {found.removed:,} files removed" if found.removed else "")
    )


def _rollouts(directory: str | Path, keep_gb: float | None) -> str:
    found = kept_rollouts(directory, keep_gb=keep_gb)
    return (
        f"{directory}: {found.rollouts:,} rollouts, {found.tokens:,} tokens, in {found.phases:,} phases of "
        f"{found.bytes / 1e9:,.3f} GB" + (f"; {found.removed:,} phases removed" if found.removed else "")
    )


def _bytes(keep_gb: float) -> float:
    if not keep_gb >= 0:
        raise UserError(f"--keep-gb is {keep_gb:g}; it must be 0 or more")
    return keep_gb * 1e9


def _size(phase: Path) -> int:
    return sum(path.stat().st_size for path in phase.rglob("*") if path.is_file())
