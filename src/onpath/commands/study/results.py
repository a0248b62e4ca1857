"""From finished runs to `study.json`: rows, and per arm means, intervals and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from onpath.commands.study.budget import Used, missed, used
from onpath.commands.study.config import StudyConfig
from onpath.commands.study.intervals import PROBLEMS_ONLY, Estimate, difference, estimate, holm, p_value
from onpath.commands.study.plan import TUNING_SPLIT, Job
from onpath.evaluate.scores import Details, read_details
from onpath.evaluate.stats import pass_at_k
from onpath.run.log import read_lines
from onpath.system.errors import UserError

MEASURES = ("avg_at_k", "pass_at_k")
LEVEL = 0.05
_FEW_END = 0.5  # of an arm's samples: what is cut tells little of what it can do
_SHOWN = (
    *("avg_at_k", "ci95", "pass_at_k", "pass_at_k_ci95", "mean_length", "finished", "n", "k", "problems"),
    "first_errors",
)


class Choice(TypedDict):
    """What tuning chose for an arm."""

    lr: float
    without: list[float]
    """Rates of the grid whose runs had failed."""


Scores = dict[int | None, NDArray[np.float64]]
"""Seed → scores_P; None: the same model for every seed."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run with its final evaluations."""

    job: Job
    asked: Job
    """Whose evaluations count: the run itself, or one of its model on other questions."""
    evals: Mapping[str, Mapping[str, Any]]
    """Split → line of eval.jsonl."""
    details: Mapping[str, Details]
    used: Used | None
    """None: not trained."""

    @classmethod
    def read(cls, job: Job, asked: Job) -> "Finished":
        lines = [r for r in read_lines(asked.directory / "eval.jsonl") if r["step"] == asked.last_step]
        return cls(
            job=job,
            asked=asked,
            evals={row["split"]: row for row in lines},
            details={split: read_details(asked.details(split)) for split in asked.config.evaluations},
            used=used(read_lines(job.directory / "metrics.jsonl")) if job.trains else None,
        )

    def row(self, study: StudyConfig) -> dict[str, Any]:
        """A row of study.json."""
        return {
            "arm": self.job.arm,
            "kind": study.arms[self.job.arm].kind,
            "seed": self.job.seed,
            "run": str(self.job.directory.relative_to(study.directory)),
            "evaluation": str(self.asked.directory.relative_to(study.directory)),
            "steps": self.job.last_step,
            "lr": self.job.config.optim.lr if self.job.trains else None,
            "evals": {split: {k: line.get(k) for k in _SHOWN} for split, line in self.evals.items()},
            **(asdict(self.used) if self.used else dict.fromkeys(Used.__dataclass_fields__, 0)),
        }


def check_comparable(finished: Sequence[Finished]) -> None:
    """The same problems, grader and sampling in every run, as the files say.

    Raises:
        UserError: two runs differ; split, runs and difference are named.
    """
    first = finished[0]
    for other in finished[1:]:
        for split, ours in first.details.items():
            theirs = other.details[split]
            if why := _difference(ours, theirs):
                raise UserError(
                    f"{other.job.directory} and {first.job.directory} cannot be in one study: on {split} "
                    f"{why}"
                )


def _difference(ours: Details, theirs: Details) -> str | None:
    if ours.grader != theirs.grader:
        return f"one was graded by {theirs.grader!r}, the other by {ours.grader!r}"
    for key in sorted({*ours.sampling, *theirs.sampling}):
        here, there = ours.sampling.get(key), theirs.sampling.get(key)
        if here != there:
            return f"sampling.{key} is {there!r} in one, {here!r} in the other"
    for name in sorted({*ours.problems, *theirs.problems}):
        pair = (ours.problems.get(name), theirs.problems.get(name))
        if None in pair:
            return f"only one of them has problem {name!r}"
        if len({p.digest for p in pair if p}) > 1:
            return f"problem {name!r} is not the same in both: the data has changed between the runs"
    return None


def gather(study: StudyConfig, jobs: Sequence[tuple[Job, Job]]) -> tuple[dict[str, Any], Finished]:
    """Rows, arms and leaders of study.json from the runs that are finished, and the first of these."""
    finished = [Finished.read(job, asked) for job, asked in jobs if job.finished and asked.finished]
    if not finished:
        raise UserError(f"{study.directory}: no run has finished, so there is nothing to compare")
    check_comparable(finished)
    splits = list(finished[0].details)
    scores = {split: {m: _scores(finished, split, m) for m in MEASURES} for split in splits}
    arms = [_arm(study, name, [f for f in finished if f.job.arm == name], scores) for name in study.arms]
    arms = [arm for arm in arms if arm["runs"]]
    for split in splits:
        for measure in MEASURES:
            _judge([arm["evals"][split][measure]["difference"] for arm in arms])
    data = {
        "rows": [f.row(study) for f in finished],
        "arms": arms,
        "leaders": {split: _leaders(study, scores[split]["avg_at_k"]) for split in splits},
    }
    return data, finished[0]


def _scores(finished: Sequence[Finished], split: str, measure: str) -> dict[str, Scores]:
    """Arm → seed → one score per problem, the problems in one order."""
    order = list(finished[0].details[split].problems)
    k = finished[0].evals[split]["k"]
    table: dict[str, Scores] = {}
    for run in finished:
        verdicts = [run.details[split].problems[name].correct for name in order]
        values = (
            [sum(v) / len(v) for v in verdicts]
            if measure == "avg_at_k"
            else [pass_at_k(n=len(v), c=sum(v), k=k) for v in verdicts]
        )
        table.setdefault(run.job.arm, {})[run.job.seed] = np.array(values)
    return table


def paired(ours: Scores, theirs: Scores) -> NDArray[np.float64] | None:
    """Ours − theirs, [seeds, problems], on the seeds that both have; None where there are none.

    What does not depend on the seed is paired with each.
    """
    seeds = [s for s in ours if s in theirs or None in theirs]
    if None in ours and None not in theirs:
        seeds = list(theirs)
    pairs = [(ours.get(s, ours.get(None)), theirs.get(s, theirs.get(None))) for s in seeds]
    rows = [a - b for a, b in pairs if a is not None and b is not None]
    return np.stack(rows) if rows else None


def _arm(
    study: StudyConfig,
    name: str,
    mine: Sequence[Finished],
    scores: Mapping[str, Mapping[str, Mapping[str, Scores]]],
) -> dict[str, Any]:
    if not mine:
        return {"runs": 0}
    evals: dict[str, dict[str, Any]] = {}
    for split, by_measure in scores.items():
        evals[split] = {m: _measured(name, study.base_arm, by_measure[m]) for m in MEASURES}
        for key in ("mean_length", "finished"):
            evals[split][key] = float(np.mean([f.evals[split][key] for f in mine]))
        evals[split]["first_errors"] = _mean_errors([f.evals[split].get("first_errors") for f in mine])
    spent = [asdict(f.used) for f in mine if f.used]
    return {
        "arm": name,
        "kind": study.arms[name].kind,
        "runs": len(mine),
        "seeds": [f.job.seed for f in mine if f.job.seed is not None],
        "steps": max(f.job.last_step for f in mine),
        "lr": mine[0].job.config.optim.lr if mine[0].job.trains else None,
        "evals": evals,
        **{
            key: float(np.mean([s[key] for s in spent])) if spent else 0.0
            for key in Used.__dataclass_fields__
        },
    }


def _mean_errors(found: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Kind of first error → mean share over runs; None where the task cannot tell."""
    known = [shares for shares in found if shares is not None]
    kinds = sorted({kind for shares in known for kind in shares})
    return {k: float(np.mean([s.get(k, 0.0) for s in known])) for k in kinds} if known else None


def _measured(name: str, base: str, by_arm: Mapping[str, Scores]) -> dict[str, Any]:
    own = by_arm[name]
    values_SP = np.stack(list(own.values()))
    row = _json(estimate(values_SP))
    row["seed_sd"] = float(np.std(values_SP.mean(axis=1), ddof=1)) if len(own) > 1 else None
    apart = paired(own, by_arm[base]) if base in by_arm and base != name else None
    row["difference"] = None if apart is None else {**_json(difference(apart)), "pairs": len(apart)}
    return row


def _json(value: Estimate) -> dict[str, Any]:
    plain = {**asdict(value), "ci95": list(value.ci95)}
    if value.p_value is None:
        del plain["p_value"]
    return plain


def _judge(differences: Sequence[dict[str, Any] | None]) -> None:
    """Adds p_holm and a verdict: many arms are compared with one, and one in twenty would win by chance. An
    interval that covers 0 is inside the noise too."""
    given = [d for d in differences if d is not None]
    for row, adjusted in zip(given, holm([d["p_value"] for d in given]), strict=True):
        low, high = row["ci95"]
        told = adjusted < LEVEL and not low <= 0 <= high
        row["p_holm"] = adjusted
        row["verdict"] = ("higher" if row["mean"] > 0 else "lower") if told else "inside the noise"


def _leaders(study: StudyConfig, by_arm: Mapping[str, Scores]) -> dict[str, Any] | None:
    """The highest mean among the arms but the teacher, and the arms that the noise does not tell from it.

    All pairs are corrected for together, since which one is highest is itself seen in the data. `pairs` is
    the least number of seeds that it has in common with the runner-up and with those; `too_few_pairs` are the
    ones with fewer than two of them, None: all arms are.
    """
    names = [a for a in by_arm if study.arms[a].kind != "teacher"]
    if len(names) < 2:
        return None
    means = {a: float(np.stack(list(by_arm[a].values())).mean()) for a in names}
    top = max(names, key=lambda a: means[a])
    gaps = {(a, b): paired(by_arm[a], by_arm[b]) for a, b in combinations(names, 2)}
    known = {pair: gap for pair, gap in gaps.items() if gap is not None}
    adjusted = dict(zip(known, holm([p_value(gap) for gap in known.values()]), strict=True))
    rivals = sorted((a for a in names if a != top), key=lambda a: -means[a])
    near = [a for a in names if a != top and adjusted.get((a, top), adjusted.get((top, a), 1.0)) >= LEVEL]
    counts = {a: next((len(gap) for pair, gap in known.items() if {a, top} == {*pair}), 0) for a in rivals}
    contest = [a for a in rivals if a == rivals[0] or a in near]
    few = [a for a in contest if counts[a] < 2]
    return {
        "measure": "avg_at_k",
        "highest": top,
        "mean": means[top],
        "not_told_apart": near,
        "pairs": min(counts[a] for a in contest),
        "too_few_pairs": few if any(count >= 2 for count in counts.values()) else None,
        "without": [a for a in by_arm if a not in names],
    }


def tuned(
    study: StudyConfig, jobs: Sequence[Job], before: Mapping[str, Choice]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The tuning table, and arm → chosen rate: the highest average, of equal ones the lowest rate.

    Args:
        before: what was chosen when runs of an arm began: a rate whose own run failed then, and did not now,
            comes too late.
    """
    table: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    for arm in dict.fromkeys(job.arm for job in jobs):
        grid = [_tried(job) for job in sorted(jobs, key=lambda j: j.config.optim.lr) if job.arm == arm]
        done = [g for g in grid if g["avg_at_k"] is not None]
        if done:  # equal counts are no equal sums of floats
            rates[arm] = max(done, key=lambda g: round(g["avg_at_k"], 9))["lr"]
        kept = before.get(arm)
        if kept is not None and rates.get(arm) in kept["without"]:
            rates[arm] = kept["lr"]
        chosen = rates.get(arm)
        at_edge = chosen is not None and chosen in (done[0]["lr"], done[-1]["lr"])
        failed = [g["lr"] for g in grid if g["avg_at_k"] is None]
        without = kept["without"] if kept is not None and chosen == kept["lr"] else failed
        table.append({"arm": arm, "grid": grid, "chosen": chosen, "at_edge": at_edge, "without": without})
    for name, spec in study.arms.items():
        if spec.tuned_like in rates:
            rates[name] = rates[spec.tuned_like]
    return table, rates


def tuning_notes(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rates that were chosen without one of the grid, as sentences."""
    return [
        f"the learning rate of {row['arm']}, {row['chosen']:g}, was chosen without "
        f"{', '.join(f'{lr:g}' for lr in row['without'])}: their runs had failed by then"
        for row in table
        if row["without"] and row["chosen"] is not None
    ]


def _tried(job: Job) -> dict[str, Any]:
    lines = [r for r in read_lines(job.directory / "eval.jsonl") if r["split"] == TUNING_SPLIT]
    last = next((r for r in lines if r["step"] == job.last_step and job.finished), None)
    return {
        "lr": job.config.optim.lr,
        "avg_at_k": last["avg_at_k"] if last else None,
        "ci95": last["ci95"] if last else None,
        "problems": last["problems"] if last else None,
    }


def stopped(jobs: Sequence[tuple[Job, Job]]) -> list[str]:
    """Runs that ended before their budget did, as sentences."""
    return [
        f"{job.name} was stopped by run.stop_after at step {job.last_step:,} of {job.config.optim.steps:,}: "
        "its numbers are those of that step"
        for job, _ in jobs
        if job.stopped_early
    ]


def notes_of(study: StudyConfig, data: Mapping[str, Any], failed: Mapping[str, str]) -> list[str]:
    """What a reader must know before the numbers."""
    notes = [f"{name} failed: {why}" for name, why in failed.items()]
    overs = {
        arm["evals"][s]["avg_at_k"]["over"] for arm in data["arms"] for s in arm["evals"] if arm["seeds"]
    }
    if PROBLEMS_ONLY in overs:
        notes.append(
            "intervals of arms with one seed cover problems only: another seed may fall outside them"
        )
    for arm in data["arms"]:
        missing = [s for s in study.seeds if s not in arm["seeds"]] if arm["kind"] == "train" else []
        if missing:
            notes.append(f"{arm['arm']} has no finished run for seed {', '.join(map(str, missing))}")
        ended = {split: arm["evals"][split]["finished"] for split in arm["evals"]}
        if ended and (least := min(ended.values())) < _FEW_END:
            split = next(s for s in ended if ended[s] == least)
            notes.append(
                f"{arm['arm']} ended {least:.0%} of its samples of {split}; the others were cut at "
                f"eval.max_new_tokens ({study.base.eval.max_new_tokens}) and graded as they stand"
            )
    absent = [a for a in study.arms if a not in {arm["arm"] for arm in data["arms"]}]
    notes += [f"{name} has no finished run" for name in absent]
    fields = Used.__dataclass_fields__
    return notes + missed(
        study, {a["arm"]: Used(**{f: a[f] for f in fields}) for a in data["arms"] if a["seeds"]}
    )
