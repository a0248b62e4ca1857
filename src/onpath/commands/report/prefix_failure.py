"""Recoverability by position, where the prefix-failure probe has looked at the run."""

from pathlib import Path
from statistics import fmean

from onpath.commands.probes.prefix_records import by_offset, clearest, rates, read_probed
from onpath.commands.report import charts
from onpath.commands.report.charts import Chart
from onpath.evaluate.stats import bootstrap_interval
from onpath.system.reading import read_json

_EXPLAINED = (
    "From prefixes of the student's rollouts student and teacher go on, several times each. Where both fail, "
    "the prefix has failed: what the teacher says after it is no longer advice that leads anywhere."
)


def explained(run: Path) -> str:
    """What the section is about, and whose prefixes: a probe before the run is of its starting weights."""
    path = run / "probes" / "prefix_failure.json"
    student = read_json(path, keys={}).get("student") if path.is_file() else None
    return f"{_EXPLAINED} The student here: {student}." if student else _EXPLAINED


def of_prefixes(run: Path) -> list[Chart | None]:
    """Both success rates by position, and what the teacher would say there; nothing without the probe's file.

    Raises:
        UserError: the file is damaged.
    """
    path = run / "probes" / "prefix_failure.jsonl"
    found = read_probed(path) if path.is_file() else []
    if not found:
        return []
    shown, known = clearest(found)
    x = "tokens from the start of the first wrong step" if known else "token of the response"
    kind = "rollouts with a known first error" if known else "rollouts"
    own = by_offset(shown, lambda p: list(enumerate(p.token_probability)))
    onset = by_offset(shown, lambda p: list(enumerate(p.onset_mass)))
    modes = [
        charts.series("goes on as the student did (mean)", list(own), [fmean(v) for v in own.values()]),
        charts.series("opens a correction (highest)", list(onset), [max(v) for v in onset.values()]),
    ]
    return [
        charts.lines(
            "Recoverability by position",
            [_goes_on(f"{who} goes on", by_offset(shown, rates(who))) for who in ("student", "teacher")],
            x=x,
            unit="%",
            help=f"Share of continuations that end right: {len(shown):,} {kind}, {shown[0].trials} "
            "continuations by each at each position. Bands: 95%, over rollouts.",
        ),
        charts.lines(
            "Teacher's two modes", modes, x=x, help="Its probability of the next token, along the same."
        ),
    ]


def _goes_on(name: str, grouped: dict[int, list[float]]) -> charts.Series:
    bounds = [bootstrap_interval(values, resamples=500) for values in grouped.values()]
    means = [fmean(values) for values in grouped.values()]
    return charts.series(name, list(grouped), means, low=[b[0] for b in bounds], high=[b[1] for b in bounds])
