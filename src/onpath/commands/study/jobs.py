"""Runs jobs in processes of their own, several at a time, and says how far they are.

A killed study leaves runs that are whole or can go on: the same command continues. The lock file is held by
the study and by every process that it started, so that two of them never write into one run.
"""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.status import Status

from onpath.commands.study import fork_server
from onpath.commands.study.config import Parallel
from onpath.commands.study.plan import Job
from onpath.run.log import read_lines
from onpath.system import launcher
from onpath.system.errors import UserError
from onpath.system.files import try_lock, write_text

LOCK = ".lock"
"""In a study's directory."""
_POLL = 0.1
_GRACE = 90.0
"""Seconds that the other processes of a run have to end when one has failed: they may have a step to save."""
_OF_OTHERS = re.compile("another process of this run|does not meet the others")
_REFRESH = 2.0


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Where jobs run."""

    processes: int
    """Runs at a time."""
    threads: int
    gpus: tuple[str, ...] = ()
    """Visible GPUs, dealt to the runs: each has as many of its own as there are for all, at least one."""
    ranks: int = 1
    """Processes of each run."""

    def environments(self, slot: int) -> list[dict[str, str]]:
        """Of each process of the run in one slot."""
        if self.ranks == 1:
            return [self._environment(slot)]
        return [{**self._environment(slot), **rank} for rank in launcher.environments(self.ranks)]

    def _environment(self, slot: int) -> dict[str, str]:
        threads = str(self.threads)
        own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.gpus:
            each = max(1, len(self.gpus) // self.processes)
            mine = (self.gpus[(slot * each + i) % len(self.gpus)] for i in range(each))
            own["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return {**os.environ, **own}


def slots_for(parallel: Parallel, device: str) -> Slots:
    """As many runs at a time as asked for; auto: as many as GPUs, or else cores, are enough for.

    Raises:
        UserError: processes of one run would share a GPU.
    """
    gpus = () if device == "cpu" else _visible_gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    automatic = max(1, (len(gpus) or cores // parallel.threads) // parallel.ranks)
    processes = automatic if parallel.processes == "auto" else parallel.processes
    if gpus and parallel.ranks > max(1, len(gpus) // processes):
        raise UserError(
            f"parallel: {processes} runs at a time of {parallel.ranks} processes each need "
            f"{processes * parallel.ranks} GPUs, and {len(gpus)} are visible; lower parallel.processes or "
            "parallel.ranks"
        )
    return Slots(processes=processes, threads=parallel.threads, gpus=gpus, ranks=parallel.ranks)


def _visible_gpus() -> tuple[str, ...]:
    import torch

    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return tuple(asked.split(",")[:count]) if asked else tuple(str(i) for i in range(count))


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Yields the descriptor of the study's lock, for processes to inherit.

    Raises:
        UserError: somebody holds it, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"dir: cannot write to {directory}: {error.strerror}") from None
    try:
        if not try_lock(descriptor):
            raise UserError(
                f"{directory}: another onpath study is at work here, or a run that a killed one left behind; "
                "wait until it ends"
            )
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(kw_only=True)
class Progress:
    """Jobs of the whole study: what is done, and how long the rest will take."""

    console: Console
    processes: int
    ahead: list[Job] = field(default_factory=list)
    """Of later stages."""
    total: int = 0
    done: int = 0
    took: list[tuple[Job, float]] = field(default_factory=list)
    """Jobs that ran from beginning to end here, with their seconds."""

    def seconds_left(self, waiting: Sequence[Job], running: Sequence["_Running"]) -> float | None:
        """None where nothing is known yet. A job takes what those of its arm took at its stage, or else at
        any stage, or else what all jobs took."""
        known = self.took + [(r.job, r.elapsed / r.share) for r in running if r.share > 0]
        if not known:
            return None

        def cost(job: Job) -> float:
            alike = [(j.stage == job.stage, seconds) for j, seconds in known if j.arm == job.arm]
            return mean([s for same, s in alike if same] or [s for _, s in alike] or [s for _, s in known])

        work = sum(cost(j) for j in (*waiting, *self.ahead) if not j.finished)
        return (work + sum(cost(r.job) * (1 - min(r.share, 1)) for r in running)) / self.processes

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(kw_only=True)
class _Running:
    job: Job
    processes: Sequence[BaseProcess]
    slot: int
    log: Path
    since: int
    """Bytes of the log that earlier processes wrote."""
    begun: float = field(default_factory=time.monotonic)
    resumed: bool = False
    """An earlier process had begun it: its time here says little."""
    first: int | None = None
    """The process that was first seen to have failed."""
    failed: float = 0.0
    """When that was."""

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    @property
    def code(self) -> int | None:
        """The exit code of one that failed, else 0; None while one is at work."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def end_all(self) -> None:
        """Ends what is left of a run of which a process has failed, once the others had time to end."""
        bad = next((i for i, process in enumerate(self.processes) if process.exitcode), None)
        if self.first is None and bad is not None:
            self.first, self.failed = bad, time.monotonic()
        if self.first is not None and self.code is None and time.monotonic() - self.failed > _GRACE:
            for process in self.processes:
                process.kill()

    @property
    def share(self) -> float:
        """Of its steps that are done; evaluations count for nothing."""
        return len(read_lines(self.job.directory / "metrics.jsonl")) / max(1, self.job.last_step)


def run_jobs(
    jobs: Sequence[Job], slots: Slots, progress: Progress, *, study: Path, lock: int
) -> dict[str, str]:
    """Runs what is not finished.

    Returns:
        Name of a job that failed → its sentence. The others are run all the same.
    """
    waiting = [job for job in jobs if not job.finished]
    for job in jobs:
        if job.finished:
            progress.done += 1
            _tidy(job)
    running: list[_Running] = []
    failed: dict[str, str] = {}
    status = Status("", console=progress.console)
    drawn = 0.0
    try:
        while waiting or running:
            free = sorted(set(range(slots.processes)) - {r.slot for r in running})
            for slot in free[: len(waiting)]:
                running.append(_start(waiting.pop(0), slots, slot, study, lock))
            for r in running:
                r.end_all()
            for ended in [r for r in running if r.code is not None]:
                running.remove(ended)
                _finish(ended, progress, failed, waiting, running)
            if progress.console.is_terminal and time.monotonic() - drawn > _REFRESH:
                drawn = time.monotonic()
                names = ", ".join(f"{r.job.name} {min(r.share, 1):.0%}" for r in running)
                status.update(
                    f"{progress.done}/{progress.total}  {names}  {_left(progress, waiting, running)}"
                )
                status.start()
            time.sleep(_POLL)
    finally:
        status.stop()
        left = [process for r in running for process in r.processes]
        for process in left:
            process.terminate()
        for process in left:
            process.join()
    return failed


def _start(job: Job, slots: Slots, slot: int, study: Path, lock: int) -> _Running:
    config, log = (
        study / part / f"{job.stage}-{job.name}{end}"
        for part, end in (("configs", ".yaml"), ("logs", ".txt"))
    )
    write_text(config, job.config.to_yaml())
    log.parent.mkdir(exist_ok=True)
    log.touch()
    since = log.stat().st_size
    resumed = job.directory.exists()
    work = "trained" if job.trains else "untrained"
    processes = [
        fork_server.start(work, config, log=log, lock=lock, environment=environment)
        for environment in slots.environments(slot)
    ]
    return _Running(job=job, processes=processes, slot=slot, log=log, since=since, resumed=resumed)


def _finish(
    ended: _Running,
    progress: Progress,
    failed: dict[str, str],
    waiting: Sequence[Job],
    running: Sequence[_Running],
) -> None:
    job, progress.done = ended.job, progress.done + 1
    if ended.code or not job.finished:
        failed[job.name] = _why(ended)
        outcome = f"failed: {failed[job.name]}"
    else:
        _tidy(job)
        outcome = f"{ended.elapsed:,.0f} s"
        if not ended.resumed:
            progress.took.append((job, ended.elapsed))
    left = _left(progress, waiting, running)
    progress.say(f"{progress.done}/{progress.total}  {job.stage}/{job.name}  {outcome}  {left}")


def _tidy(job: Job) -> None:
    """Nobody goes on from a finished run: its checkpoints are several times its model."""
    shutil.rmtree(job.directory / "checkpoints", ignore_errors=True)


def _left(progress: Progress, waiting: Sequence[Job], running: Sequence[_Running]) -> str:
    if not (waiting or running or progress.ahead):
        return ""
    seconds = progress.seconds_left(waiting, running)
    return (
        ""
        if seconds is None
        else f"about {seconds / 60:,.0f} min left"
        if seconds > 90
        else f"{seconds:,.0f} s left"
    )


def _why(ended: _Running) -> str:
    """The signal that killed a process, else the sentence that it ended with, or its last line."""
    rank, several = ended.first or 0, len(ended.processes) > 1
    code, who = ended.processes[rank].exitcode or 0, f"process {rank} " if several else ""
    if code < 0:
        hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
        return f"{who}was killed by {_signal_name(-code)}{hint} (log: {ended.log})"
    with ended.log.open("rb") as file:
        file.seek(ended.since)
        text = file.read().decode("utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if several:  # they say of each other that one has left, and torch does
        lines = [line for line in lines if line.startswith("onpath: ") and not _OF_OTHERS.search(line)]
    said = lines[-1].removeprefix("onpath: ") if lines else f"{who}ended without a word"
    return f"{said} (log: {ended.log})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of a real-time kernel's
        return f"signal {number}"
