"""A study on the page: comparison, cost, curves with bands over seeds, trajectories of each arm."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from onpath.commands.report import charts
from onpath.commands.report.charts import Chart, Series
from onpath.commands.report.pack import pack_all
from onpath.commands.report.run import (
    BUDGET,
    ROWS,
    SHOWN,
    TOKENS,
    arranged,
    column,
    read_config,
    read_json,
    section,
    short_commit,
    truth_of,
)
from onpath.commands.report.text import known_tokens
from onpath.evaluate.scores import read_details
from onpath.evaluate.stats import pass_at_k
from onpath.run.log import read_lines
from onpath.run.trajectories import Row, sample
from onpath.system.errors import UserError

_CURVES = (
    ("Accuracy of the rollouts", "accuracy", "%", "Share of right answers among the rollouts of each step."),
    (
        "Reverse KL",
        "reverse_kl_nats",
        "nats per token",
        "Along what each arm trains on: arms differ in that.",
    ),
    ("Student's entropy", "student_entropy_nats", "nats per token", "Likewise."),
    ("Response length", "mean_length", "tokens", "Mean tokens of a rollout."),
    ("Behind the first error", "tokens_behind_error", "%", "Share of the rollouts' tokens, where known."),
)
_EXPLAINED = (
    "Dots: means over seeds and problems; bars: 95% intervals; small dots: single seeds. An interval of a "
    "difference that covers 0 is inside the noise; verdicts are corrected for the number of arms (Holm)."
)


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One finished run of an arm with its curves."""

    arm: str
    directory: Path
    metrics: list[Row]
    evals: list[Row]
    evaluation: Path
    """The directory whose evaluations count: the run's, or one of its model on other questions."""


def gather_study(directory: Path) -> dict[str, Any]:
    """The page's data.

    Raises:
        UserError: study.json or a file of a run is damaged.
    """
    data = read_json(directory / "study.json")
    if missing := {"study", "rows", "arms"} - data.keys():
        raise UserError(f"{directory / 'study.json'}: not a study's results: it lacks {min(missing)}")
    about, arms = data["study"], data["arms"]
    runs = [read_run(directory, row) for row in data["rows"] if (directory / row["run"]).is_dir()]
    shown, strings, total = trajectories(runs)
    notes = list(data.get("notes") or ())
    if shown and len(shown) < total:
        notes.append(f"A sample: {len(shown):,} of {total:,} stored trajectories of each arm's first run.")
    if len(runs) < len(data["rows"]):
        notes.append(
            f"{len(data['rows']) - len(runs)} of {len(data['rows'])} runs are no longer beside study.json."
        )
    if any(run.evaluation != run.directory for run in runs):
        notes.append(
            "Accuracies by step are of what the runs were asked while they trained; all else is of what the "
            "study asks now."
        )
    splits = about["splits"]
    return {
        "kind": "study",
        "title": about["name"],
        "facts": facts(about, data.get("environment") or {}, arms),
        "tiles": [],
        "notes": notes,
        "sections": [
            section("Comparison", [c for s in splits for c in comparison(data, s)], _EXPLAINED),
            section(
                "Cost",
                [cost(arms, about, s, *c) for s in splits for c in _COSTS],
                "What each arm used for its accuracy.",
            ),
            section(
                "Curves",
                curves(runs, splits),
                "Means over seeds by optimiser step; bands: the range over seeds.",
            ),
        ],
        "vocabulary": strings,
        "trajectories": shown,
    }


def read_run(directory: Path, row: Row) -> ArmRun:
    """A run of the study, by its row in study.json."""
    run = directory / row["run"]
    metrics, evals = read_lines(run / "metrics.jsonl"), read_lines(run / "eval.jsonl")
    evaluation = directory / str(row.get("evaluation", row["run"]))
    return ArmRun(arm=row["arm"], directory=run, metrics=metrics, evals=evals, evaluation=evaluation)


def facts(about: Row, environment: Row, arms: Sequence[Row]) -> list[list[str]]:
    """What was compared, as label and value."""
    budget = about.get("budget") or {}
    known = {
        "command": about.get("command"),
        "arms": len(arms),
        "seeds": ", ".join(map(str, about.get("seeds") or ())),
        "compared with": about.get("base_arm"),
        "budget": f"{budget['amount']:,} {budget['measure']}".replace("_", " ") if budget else None,
        "problems": ", ".join(f"{split} {count:,}" for split, count in (about.get("problems") or {}).items()),
        "samples per problem": about.get("n"),
        "grader": about.get("grader"),
        "device": environment.get("device"),
        "commit": short_commit(environment.get("git_commit")),
    }
    return [[label, str(value)] for label, value in known.items() if value not in (None, "")]


def comparison(data: Row, split: str) -> Sequence[Chart | None]:
    """Means, differences from the base arm, pass@k, pass@k by k, and the table of one split."""
    about, arms = data["study"], data["arms"]
    seeds = {arm["arm"]: [r["evals"][split] for r in data["rows"] if r["arm"] == arm["arm"]] for arm in arms}
    base = about.get("base_arm")
    found: list[Chart | None] = []
    n = samples(about, split)
    shown = [("avg_at_k", f"avg@{n}"), ("pass_at_k", f"pass@{min(n, about['k'])}")]
    for key, title in shown if n > 1 else shown[:1]:  # of one sample they are the same
        rows = [
            {
                **estimate(arm["evals"][split][key]),
                "name": arm["arm"],
                "points": [e[key] for e in seeds[arm["arm"]]],
            }
            for arm in arms
        ]
        reference = next((row["mean"] for row in rows if row["name"] == base), None)
        found.append(intervals(f"{title}, {split}", rows, f"share right; line: {base}", reference))
    apart = [(arm["arm"], arm["evals"][split]["avg_at_k"].get("difference")) for arm in arms]
    rows = [{**estimate(d), "name": name, "points": []} for name, d in apart if d]
    found.append(
        intervals(f"Paired difference from {base}, {split}", rows, f"avg@{n}, same seeds and problems", 0.0)
    )
    return [*found, first_errors(arms, split), table(arms, about, split)]


def samples(about: Row, split: str) -> int:
    """Per problem, of an evaluation: a greedy one has one."""
    return int((about.get("samples") or {split: about["n"]})[split])


def first_errors(arms: Sequence[Row], split: str) -> Chart | None:
    """What goes wrong first, by arm; None where the task cannot tell."""
    known = {arm["arm"]: arm["evals"][split].get("first_errors") for arm in arms}
    kinds = sorted({kind for shares in known.values() for kind in shares or {}})
    if not kinds:
        return None
    rows = [
        [name, f"{sum(shares.values()):.1%}", *(f"{shares.get(kind, 0):.1%}" for kind in kinds)]
        for name, shares in known.items()
        if shares is not None
    ]
    return {
        "kind": "table",
        "title": f"Kinds of first errors, {split}",
        "help": "Shares of all samples.",
        "columns": ["arm", "wrong", *kinds],
        "rows": rows,
    }


def estimate(value: Row) -> Row:
    """Mean and interval as the plots want them."""
    return {"mean": value["mean"], "low": value["ci95"][0], "high": value["ci95"][1]}


def intervals(title: str, rows: Sequence[Row], x: str, reference: float | None) -> Chart | None:
    """One row per arm; None without rows."""
    if not rows:
        return None
    return {
        "kind": "intervals",
        "title": title,
        "help": "",
        "x": x,
        "unit": "%",
        "rows": rows,
        "reference": reference,
    }


def table(arms: Sequence[Row], about: Row, split: str) -> Chart:
    """All numbers of one split."""
    columns = [
        "arm",
        "seeds",
        "steps",
        f"avg@{samples(about, split)}",
        "95% interval",
        f"pass@{min(samples(about, split), about['k'])}",
        "difference",
        "95% interval",
        "verdict",
        "length",
        "tokens updated",
        "generated",
        "seconds",
    ]
    rows = []
    for arm in arms:
        held = arm["evals"][split]
        difference = held["avg_at_k"].get("difference")
        generated = arm["tokens_generated_student"] + arm["tokens_generated_teacher"]
        rows.append(
            [
                arm["arm"],
                str(len(arm["seeds"]) or "–"),
                str(arm["steps"]),
                f"{held['avg_at_k']['mean']:.1%}",
                span(held["avg_at_k"]),
                f"{held['pass_at_k']['mean']:.1%}",
                f"{difference['mean']:+.1%}" if difference else "–",
                span(difference, "+") if difference else "–",
                difference.get("verdict", "–") if difference else "–",
                f"{held['mean_length']:.1f}",
                f"{arm['updated_tokens']:,.0f}",
                f"{generated:,.0f}",
                f"{arm['wall_seconds']:,.0f}",
            ]
        )
    return {"kind": "table", "title": f"All arms, {split}", "help": "", "columns": columns, "rows": rows}


def span(value: Row, sign: str = "") -> str:
    """An interval in words."""
    low, high = value["ci95"]
    return f"{low:{sign}.1%} to {high:{sign}.1%}"


_COSTS = (
    ("generated tokens", ("tokens_generated_student", "tokens_generated_teacher")),
    ("seconds of training", ("wall_seconds",)),
)


def cost(arms: Sequence[Row], about: Row, split: str, name: str, keys: Sequence[str]) -> Chart | None:
    """Accuracy against what was spent, a point per arm."""
    points = [
        charts.series(
            arm["arm"],
            [round(sum(arm[key] for key in keys))],
            [arm["evals"][split]["avg_at_k"]["mean"]],
            low=[arm["evals"][split]["avg_at_k"]["ci95"][0]],
            high=[arm["evals"][split]["avg_at_k"]["ci95"][1]],
            marks=True,
        )
        for arm in arms
    ]
    return charts.lines(
        f"avg@{samples(about, split)} against {name}, {split}",
        points,
        x=f"{name}, student and teacher",
        unit="%",
        zero=False,
    )


def curves(runs: Sequence[ArmRun], splits: Sequence[str]) -> list[Chart | None]:
    """By step: evaluations, what was logged, and pass@k by k at the end."""
    drawn: list[Chart | None] = []
    for split in splits:
        evaluated = [
            over_seeds(arm, [evaluations(r, split) for r in mine], marks=True) for arm, mine in by_arm(runs)
        ]
        drawn.append(charts.lines(f"Accuracy, {split}", evaluated, unit="%", zero=False))
        passes = [over_seeds(arm, [passed(r, split) for r in mine], marks=True) for arm, mine in by_arm(runs)]
        drawn.append(
            charts.lines(f"pass@k, {split}", passes, x="k", unit="%", zero=False, help="At the last step.")
        )
    for title, key, unit, text in _CURVES:
        logged = [
            over_seeds(
                arm,
                [
                    dict(zip([m["step"] for m in r.metrics], column(r.metrics, key), strict=True))
                    for r in mine
                ],
            )
            for arm, mine in by_arm(runs)
        ]
        drawn.append(charts.lines(title, logged, unit=unit, help=text))
    return drawn


def by_arm(runs: Sequence[ArmRun]) -> list[tuple[str, list[ArmRun]]]:
    """Runs of each arm, arms in the study's order."""
    return [(arm, [r for r in runs if r.arm == arm]) for arm in dict.fromkeys(r.arm for r in runs)]


def evaluations(run: ArmRun, split: str) -> dict[int, float | None]:
    """Step → avg@k of one run."""
    return {row["step"]: row["avg_at_k"] for row in run.evals if row["split"] == split}


def passed(run: ArmRun, split: str) -> dict[int, float | None]:
    """k → pass@k of one run at its last evaluation; empty where the details are gone."""
    steps = [row["step"] for row in read_lines(run.evaluation / "eval.jsonl") if row["split"] == split]
    path = run.evaluation / "evals" / f"{split}_step_{steps[-1]:06d}.jsonl" if steps else None
    if path is None or not path.is_file():
        return {}
    counts = [(len(p.correct), sum(p.correct)) for p in read_details(path).problems.values()]
    return {
        k: fmean(pass_at_k(n=n, c=c, k=k) for n, c in counts) for k in range(1, min(n for n, _ in counts) + 1)
    }


def over_seeds(name: str, found: Sequence[dict[int, float | None]], *, marks: bool = False) -> Series | None:
    """Mean and range by x; None where nothing was logged."""
    at: dict[int, list[float]] = {}
    for one in found:
        for place, value in one.items():
            if value is not None:
                at.setdefault(place, []).append(value)
    x = sorted(at)
    if not x:
        return None
    low, high = [min(at[v]) for v in x], [max(at[v]) for v in x]
    apart = len(found) > 1
    return charts.series(
        name,
        x,
        [fmean(at[v]) for v in x],
        low=low if apart else None,
        high=high if apart else None,
        marks=marks,
    )


def trajectories(runs: Sequence[ArmRun]) -> tuple[list[Row], list[str], int]:
    """Packed trajectories of each arm's first run, the arms in turn; their tokens; how many are stored."""
    firsts = [(arm, mine[0].directory) for arm, mine in by_arm(runs)]
    share = max(1, len(firsts))
    stored = [
        (arm, run, sample(run, rows=max(1, ROWS // share), tokens=TOKENS // share)) for arm, run in firsts
    ]
    queues = [[{**row, "arm": arm} for row in arranged(held.rows)] for arm, _, held in stored]
    turns = max(map(len, queues), default=0)
    rows = [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][:SHOWN]
    labels = truth_of(read_config(firsts[0][1])) if firsts else None
    packed, strings = pack_all(rows, known=known_tokens(rows), budget=BUDGET, labels=labels)
    return packed, strings, sum(held.total for _, _, held in stored)
