"""What the page shows of one run: facts, curves, signals, trajectories."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from onpath.commands.report import charts, signal
from onpath.commands.report import prefix_failure as prefixes
from onpath.commands.report.charts import Chart
from onpath.commands.report.pack import pack_all
from onpath.commands.report.text import known_tokens
from onpath.data.tasks import task_of
from onpath.run.checkpoint import has_model
from onpath.run.log import holes, read_lines
from onpath.run.trajectories import Row, Stored, sample
from onpath.system import reading
from onpath.system.errors import UserError

ROWS, TOKENS = 800, 400_000
"""Most trajectories and response tokens that are read; the statistics are over these."""
SHOWN = 400
"""Most trajectories in the viewer."""
BUDGET = 4_700_000
"""Bytes of packed trajectories: with the rest a page stays below 5 MB."""

_CURVES = (
    (
        "Divergence",
        "nats per token",
        (
            ("reverse_kl_nats", "reverse KL(student‖teacher)"),
            ("forward_kl_nats", "forward KL(teacher‖student)"),
        ),
        "How far the student is from the teacher along what was trained on.",
    ),
    (
        "Entropy",
        "nats per token",
        (("student_entropy_nats", "student"), ("teacher_entropy_nats", "teacher")),
        "A student that collapses loses entropy faster than its teacher.",
    ),
    ("Gradient norm", "", (("grad_norm", "before clipping"),), "A spike that stays is a warning."),
    ("Response length", "tokens", (("mean_length", "rollouts"),), "Mean tokens of a rollout, with its end."),
    (
        "Behind the first error",
        "%",
        (("tokens_behind_error", "rollouts"),),
        "Share of the rollouts' tokens that follow their first wrong one, where the task can tell: what a "
        "repair could change.",
    ),
)
_SHOWN_ELSEWHERE = {
    *("step", "tokens", "accuracy", "policy_version", "student_tokens_generated"),
    *(key for _, _, keys, _ in _CURVES for key, _ in keys),
}


def gather_run(directory: Path) -> dict[str, Any]:
    """The page's data.

    Raises:
        UserError: a file of the run is damaged.
    """
    config, environment = read_config(directory), read_json(directory / "environment.json")
    metrics, evals = read_lines(directory / "metrics.jsonl"), read_lines(directory / "eval.jsonl")
    evals = [row for row in evals if "split" in row]
    stored = sample(directory, rows=ROWS, tokens=TOKENS)
    shown, strings = pack_all(
        arranged(stored.rows)[:SHOWN],
        known=known_tokens(stored.rows),
        budget=BUDGET,
        labels=truth_of(config),
    )
    return {
        "kind": "run",
        "title": at(config, "run.name") or directory.name,
        "facts": facts(config, environment, metrics),
        "tiles": tiles(metrics, evals),
        "notes": notes(directory, config, metrics, stored, len(shown)),
        "sections": [
            section("Learning", learning(metrics, evals), "Curves over optimiser steps. Intervals are 95%."),
            section(
                "Teachers", of_teachers(metrics), "What each of several teachers measures on its prompts."
            ),
            section(
                "Signal",
                [*signal.of_rows(stored.rows), signal.behind_errors(stored.rows, truth_of(config))],
                signal.EXPLAINED,
            ),
            section("Rewrites", signal.of_rewrites(metrics, stored.rows), signal.REWRITES_EXPLAINED),
            section("Forks", signal.of_forks(metrics, stored.rows, truth_of(config)), signal.FORKS_EXPLAINED),
            section("Failed prefixes", prefixes.of_prefixes(directory), prefixes.explained(directory)),
            section(
                "Everything else that was logged", others(metrics), "As in metrics.jsonl, by its name there."
            ),
        ],
        "vocabulary": strings,
        "trajectories": shown,
    }


def section(title: str, drawn: Iterable[Chart | None], text: str) -> dict[str, Any]:
    """Charts under a heading; those with nothing to draw are left out."""
    return {"title": title, "text": text, "charts": [chart for chart in drawn if chart]}


def read_config(directory: Path) -> dict[str, Any]:
    """config.yaml as plain data; the report of an old run must not fail on an option that is gone."""
    path = directory / "config.yaml"
    data = reading.read_yaml(path)
    if not isinstance(data, dict) or not all(isinstance(v, dict | None) for v in data.values()):
        raise UserError(f"{path}: damaged: must be a mapping of sections")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.exists():
        return {}
    data: dict[str, Any] = reading.read_json(path, keys={})
    return data


def at(config: dict[str, Any], dotted: str) -> Any:
    """A value of the config, None where it is not set."""
    name, _, key = dotted.partition(".")
    return (config.get(name) or {}).get(key)


def facts(config: dict[str, Any], environment: dict[str, Any], metrics: Sequence[Row]) -> list[list[str]]:
    """What was run, as label and value."""
    packages = environment.get("packages") or {}
    seconds = sum(sum(row.get("seconds", {}).values()) for row in metrics)
    known = {
        "method": at(config, "method.name"),
        "divergence": objective(config),
        "student": at(config, "student.model"),
        "teacher": taught_by(config),
        "data": at(config, "data.train"),
        "prompts × samples per step": f"{at(config, 'rollout.prompts')} × {at(config, 'rollout.n')}",
        "learning rate": at(config, "optim.lr"),
        "seed": at(config, "run.seed"),
        "grader": environment.get("grader"),
        "training time": f"{seconds:,.0f} s" if metrics else None,
        "device": environment.get("device"),
        "onpath, torch": ", ".join(packages[k] for k in ("onpath", "torch") if k in packages) or None,
        "commit": short_commit(environment.get("git_commit")),
    }
    return [[label, str(value)] for label, value in known.items() if value is not None]


def short_commit(commit: str | None) -> str | None:
    """Twelve digits of it, and whether the files were its.

    >>> short_commit("0123456789abcdef-dirty")
    '0123456789ab-dirty'
    """
    head, dash, state = (commit or "").partition("-")
    return f"{head[:12]}{dash}{state}" or None


def objective(config: dict[str, Any]) -> str | None:
    """The divergence, with what decides over it: support, clips, temperature; None where none is named."""
    if (kind := at(config, "method.divergence")) is None:
        return None
    found = [str(kind)]
    if kind == "jensen_shannon":
        found.append(f"beta {at(config, 'method.beta')}")
    if (support := at(config, "method.support")) not in (None, "full"):
        found.append(f"{support} {at(config, 'method.support_k')}, tail {at(config, 'method.tail')}")
    unset = {"entry_clip": None, "token_clip": None, "ppo_clip": None, "teacher_temperature": 1.0}
    given = {name: at(config, f"method.{name}") for name in unset}
    found += [f"{name} {v}" for name, v in given.items() if v not in (None, unset[name])]
    return ", ".join(found)


def taught_by(config: dict[str, Any]) -> str | None:
    """The teacher's model, or each one's name and model."""
    several = config.get("teachers") or {}
    named = [
        f"{name}: {t.get('mixture') or t['model']}"
        for name, t in several.items()
        if isinstance(t, dict) and "model" in t
    ]
    return ", ".join(named) or at(config, "teacher.model")


def tiles(metrics: Sequence[Row], evals: Sequence[Row]) -> list[dict[str, str]]:
    """The few numbers that stand at the top."""
    found = []
    for split in dict.fromkeys(row["split"] for row in evals):
        mine = [row for row in evals if row["split"] == split]
        first, last = mine[0], mine[-1]
        low, high = last["ci95"]
        before = f"{first['avg_at_k']:.1%} → " if len(mine) > 1 else ""
        found.append(
            {
                "label": f"avg@{last['n']}, {split}",
                "value": f"{before}{last['avg_at_k']:.1%}",
                "note": f"95% interval {low:.1%} to {high:.1%} over {last['problems']:,} problems",
            }
        )
    kl = [row["reverse_kl_nats"] for row in metrics if row.get("reverse_kl_nats") is not None]
    if kl:
        found.append(
            {
                "label": "reverse KL",
                "value": f"{kl[0]:.3g} → {kl[-1]:.3g}",
                "note": "nats per token, first and last step",
            }
        )
    if metrics:
        made = {
            who: sum(row.get(f"{who}_tokens_generated") or 0 for row in metrics)
            for who in ("student", "teacher")
        }
        said = ", ".join(f"{who} {count:,}" for who, count in made.items() if count or who == "student")
        steps = f"{len(metrics):,} step{'s' if len(metrics) > 1 else ''}"
        found.append(
            {
                "label": "tokens trained on",
                "value": f"{sum(row.get('tokens') or 0 for row in metrics):,}",
                "note": f"{steps}; generated: {said}",
            }
        )
    return found


def notes(
    directory: Path, config: dict[str, Any], metrics: Sequence[Row], stored: Stored, shown: int
) -> list[str]:
    """What a reader must know before believing the page."""
    found = []
    steps = at(config, "optim.steps")
    if not has_model(directory / "model"):
        found.append(f"This run has not finished: {len(metrics):,} of {steps or '?'} steps are logged.")
    spoilt = holes(metrics)
    if spoilt:
        found.append(
            f"metrics.jsonl lacks {len(spoilt):,} step{'s' if len(spoilt) > 1 else ''} before its last one, "
            f"first {spoilt[0]:,}: the curves are without them."
        )
    lost = missing_steps(directory, config, len(metrics), stored)
    if lost:
        found.append(
            f"Trajectories of {len(lost):,} stored steps are missing, first "
            f"{directory / 'trajectories' / f'step_{lost[0]:06d}.parquet'}; what is shown is without them."
        )
    elif not stored.total:
        found.append("No trajectories are stored (run.trajectories_every: 0), so there are none to look at.")
    if 0 < shown < stored.total:
        found.append(
            f"A sample: {shown:,} of {stored.total:,} stored trajectories can be looked at; "
            f"the statistics below are over {len(stored.rows):,}."
        )
    return found


def missing_steps(directory: Path, config: dict[str, Any], logged: int, stored: Stored) -> list[int]:
    """Steps that were to be stored and whose file is not there; a run in progress may be writing its last."""
    every, steps = at(config, "run.trajectories_every"), at(config, "optim.steps")
    if not every:
        return []
    end = logged if has_model(directory / "model") else logged - 1
    rule = dict.fromkeys(range(1, end + 1), every)
    changed = [r for r in read_lines(directory / "changes.jsonl") if r.get("key") == "run.trajectories_every"]
    for row in reversed(changed):  # each says what held up to its step
        rule |= dict.fromkeys(range(1, min(row["step"], end) + 1), row["before"])
    due = {step for step, often in rule.items() if often and (step in (1, steps) or step % often == 0)}
    return sorted(due - {*stored.steps})


def learning(metrics: Sequence[Row], evals: Sequence[Row]) -> list[Chart | None]:
    """Accuracy, divergence, entropy, gradients, length, seconds."""
    steps = [row["step"] for row in metrics]
    accuracy = [charts.series("rollouts, as trained", steps, [row.get("accuracy") for row in metrics])]
    passes, k = [], max((row["k"] for row in evals), default=1)
    for split in dict.fromkeys(row["split"] for row in evals):
        mine = [row for row in evals if row["split"] == split]
        if mine[0]["k"] == k:  # a greedy set has one sample
            passes.append(evaluation(split, mine, "pass_at_k", "pass_at_k_ci95"))
        accuracy.append(evaluation(split, mine, "avg_at_k", "ci95"))
    stages = dict.fromkeys(stage for row in metrics for stage in row.get("seconds", {}))
    return [
        charts.lines("Accuracy", accuracy, unit="%", help="Share of right answers."),
        charts.lines(f"pass@{k}", passes, unit="%", help=f"At least one of {k} samples is right."),
        *(
            charts.lines(title, [logged(metrics, *one) for one in keys], unit=unit, help=text)
            for title, unit, keys, text in _CURVES
        ),
        charts.stack(
            "Seconds by stage",
            [charts.series(s, steps, [r.get("seconds", {}).get(s, 0.0) for r in metrics]) for s in stages],
            unit="s",
            help="Where a step's time goes.",
        ),
    ]


_OF_TEACHERS = (
    ("reverse_kl_nats", "Reverse KL(student‖teacher)", "nats per token", "How far the student is from each."),
    ("overlap", "Overlap of likeliest tokens", "%", "Share that student and teacher have in common."),
    ("accuracy", "Accuracy by teacher", "%", "Share of right rollouts among each one's prompts."),
    ("tokens", "Tokens trained on by teacher", "tokens", "Of each step."),
)


def of_teachers(metrics: Sequence[Row]) -> Iterator[Chart | None]:
    """A curve for each of several teachers; nothing where there is one only."""
    steps = [row["step"] for row in metrics]
    tables = [row["teachers"] if isinstance(row.get("teachers"), dict) else {} for row in metrics]
    names = dict.fromkeys(name for table in tables for name in table)
    for key, title, unit, text in _OF_TEACHERS:
        curves = []
        for name in names:
            mine = [table[name] if isinstance(table.get(name), dict) else {} for table in tables]
            curves.append(charts.series(name, steps, column(mine, key)))
        yield charts.lines(title, curves, unit=unit, help=text)


def evaluation(name: str, rows: Sequence[Row], value: str, interval: str) -> charts.Series:
    """Points with intervals of one evaluation set."""
    low, high = ([row[interval][side] for row in rows] for side in (0, 1))
    x = [row["step"] for row in rows]
    return charts.series(name, x, [row[value] for row in rows], low=low, high=high, marks=True)


def logged(metrics: Sequence[Row], key: str, name: str) -> charts.Series | None:
    """One number over the steps; None where it was never logged."""
    values = column(metrics, key)
    drawn = any(v is not None for v in values)
    return charts.series(name, [row["step"] for row in metrics], values) if drawn else None


def column(metrics: Sequence[Row], key: str) -> list[float | None]:
    """One number per step; None where it was not logged."""
    values = [row.get(key) for row in metrics]
    return [float(v) if isinstance(v, int | float) else None for v in values]


def others(metrics: Sequence[Row]) -> Iterator[Chart | None]:
    """A curve for each number that no chart above has shown: what a new method logs appears by itself."""
    names = dict.fromkeys(k for row in metrics for k, v in row.items() if isinstance(v, int | float))
    for name in names:
        if name not in _SHOWN_ELSEWHERE | signal.SHOWN:
            yield charts.lines(name, [logged(metrics, name, name)], zero=False)


def truth_of(config: dict[str, Any]) -> Callable[[str, Sequence[str]], list[str]] | None:
    """(prompt, tokens) → the kind of each token, where the task knows it: the gym does."""
    task = task_of(str(at(config, "data.train") or ""))
    return task.labels if task is not None and task.labels_tokens else None


def arranged(rows: Sequence[Row]) -> list[Row]:
    """Rows so that any number of first ones is varied: steps, outcomes and forks in turn."""
    strata: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        forks = any(f["decision"] == "fork" for f in row["detail"].get("forks") or ())
        strata.setdefault((row["step"], row.get("correct"), row["edit"], forks), []).append(row)
    order = sorted(strata.values(), key=lambda group: (-group[0]["step"], len(group)))
    turns = max(map(len, order), default=0)
    return [group[turn] for turn in range(turns) for group in order if turn < len(group)]
