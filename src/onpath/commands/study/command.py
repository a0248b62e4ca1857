"""`onpath study`: arms × seeds from one YAML, with intervals that say what may be concluded.

pilots    tokens and seconds per step     only where the budget is in those
tuning    a rate per arm                  only where asked for
runs      every arm, every seed           processes of `onpath train`, resumable
again     finished models                 only where evals has changed since
results   study.json, study.md, a table
"""

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from onpath.commands.study import plan, reevaluate
from onpath.commands.study.budget import per_step, steps_of
from onpath.commands.study.config import StudyConfig, load_study
from onpath.commands.study.jobs import Progress, locked, run_jobs, slots_for
from onpath.commands.study.plan import Job
from onpath.commands.study.results import Choice, gather, notes_of, stopped, tuned, tuning_notes
from onpath.commands.study.sources import check_sources, claim
from onpath.commands.study.tables import markdown
from onpath.system.errors import UserError
from onpath.system.files import remove_leftovers, write_text
from onpath.system.reading import read_json
from onpath.system.text import yaml_text

__all__ = ["StudyConfig", "StudyResult", "carry_out", "load_study"]


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study leaves."""

    directory: Path
    """Its runs, study.json and study.md."""
    data: Mapping[str, Any]
    """What study.json holds: a row per run, and per arm means, intervals and paired differences."""
    failed: Mapping[str, str]
    """Run → sentence of those that failed; the results are those of the others."""

    def why(self) -> str:
        """How many failed, and the first one's sentence."""
        name, why = next(iter(self.failed.items()))
        return f"{len(self.failed)} of the study's runs failed, first {name}: {why}"

    def check(self) -> None:
        """Raises UserError with the first of the failed runs' sentences."""
        if self.failed:
            raise UserError(self.why())


class NothingFinished(UserError):
    """No run of a study has finished: there are no results to write."""


_CHOSEN = "tuning.json"
"""In a study's directory: the rates that its runs began with, and what they were chosen without."""


def check(study: StudyConfig) -> None:
    """Refuses what can be known to be wrong before anything runs or is written.

    Raises:
        UserError: arms that are not alike, a pilot that cannot measure, data that cannot be read.
    """
    plan.check_alike(study)
    plan.check_pilots(study)
    check_sources(study)


def carry_out(study: StudyConfig, *, command: str, quiet: bool = False) -> StudyResult:
    """Runs what is left and writes the results, also where some runs failed: ask `StudyResult.check`.

    Args:
        command: what the results say they were made with.
    """
    check(study)
    with locked(study.directory) as lock, _terminable():
        remove_leftovers(study.directory)
        claim(study)
        write_text(study.directory / "study.yaml", yaml_text(study.model_dump(mode="json")))
        slots = slots_for(study.parallel, study.base.student.device)
        stages = plan.stages(study)
        progress = Progress(
            console=Console(file=sys.stderr, quiet=quiet),
            processes=slots.processes,
            total=sum(map(len, stages)),
        )
        failed: dict[str, str] = {}

        def run(jobs: list[Job]) -> list[Job]:
            plan.check_existing(jobs)
            progress.ahead = [job for stage in stages[1:] for job in stage]
            del stages[:1]
            failed.update(run_jobs(jobs, slots, progress, study=study.directory, lock=lock))
            return jobs

        # They evaluate nothing: other questions do not make them other runs.
        pilots = run([reevaluate.as_made(job) for job in plan.pilots(study)])
        measured = {job.arm: per_step(job) for job in pilots if job.finished}
        steps = steps_of(study, measured)
        chosen = study.directory / _CHOSEN
        before = read_json(chosen, keys={}) if chosen.is_file() else {}
        tuning, rates = tuned(study, run(plan.tuning(study, steps)), before)
        if tuning:
            rated = [row for row in tuning if row["chosen"] is not None]
            now = {row["arm"]: Choice(lr=row["chosen"], without=row["without"]) for row in rated}
            write_text(chosen, json.dumps(now, indent=1) + "\n")
        planned = plan.runs(study, steps, rates)
        made = run([reevaluate.as_made(job) for job in planned])
        asked = reevaluate.evaluations(study.directory, planned, made)
        progress.total += len(asked)
        run(list(asked.values()))
        pairs = [(job, asked.get(job.name, job)) for job in made]
        if not any(job.finished and other.finished for job, other in pairs):
            # There is nothing to write: the first failure says why.
            raise NothingFinished(StudyResult(directory=study.directory, data={}, failed=failed).why())
        data = results(study, pairs, failed, command=command)
        data["notes"] += tuning_notes(tuning)
        data |= {"tuning": tuning, "pilots": {arm: asdict(use) for arm, use in measured.items()}}
        write_text(study.directory / "study.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        write_text(study.directory / "study.md", markdown(data))
    return StudyResult(directory=study.directory, data=data, failed=failed)


def results(
    study: StudyConfig, jobs: list[tuple[Job, Job]], failed: Mapping[str, str], *, command: str
) -> dict[str, Any]:
    """study.json without pilots and tuning; `jobs`: each run, and the job whose evaluations count."""
    data, first = gather(study, jobs)
    budget = study.budget
    return {
        "study": {
            "name": study.name,
            "command": command,
            "base_arm": study.base_arm,
            "seeds": study.seeds,
            "budget": {"measure": budget.measure, "amount": budget.amount} if budget else None,
            "tune": study.tune.model_dump(mode="json") if study.tune else None,
            "splits": list(first.evals),
            "problems": {split: line["problems"] for split, line in first.evals.items()},
            "samples": {split: line["n"] for split, line in first.evals.items()},
            "n": first.asked.config.eval.n,
            "k": first.asked.config.eval.k,
            "grader": next(iter(first.details.values())).grader,
            "arms": {
                name: arm.model_dump(mode="json", exclude_none=True) for name, arm in study.arms.items()
            },
        },
        "environment": read_json(first.job.directory / "environment.json"),
        "notes": notes_of(study, data, failed) + stopped(jobs),
        **data,
    }


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite kill ends the runs too, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
