"""Signals of a run as charts: by position and outcome, TRD's four cells, TOPD's loss against distance and
what its targets say."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from onpath.commands.report import charts
from onpath.commands.report.charts import Chart
from onpath.commands.report.text import was_changed
from onpath.run.trajectories import Row

CELLS = ("right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")
Truth = Callable[[str, Sequence[str]], list[str]]
"""(prompt, tokens) → what each token is."""
SHOWN = {
    *CELLS,
    *("accuracy_y", "accuracy_z", "length_ratio", "epistemic_mass_y", "epistemic_mass_z"),
    *("reverse_kl_y_right_nats", "reverse_kl_y_wrong_nats"),
    *("target_teacher_share", "target_own_share", "target_entropy_nats"),
}
"""Metrics that have a chart of their own."""
EXPLAINED = (
    "Along the stored responses, by token position and by whether the student's rollout was right. Bands: "
    "95%, over trajectories. Late positions come from long responses only."
)
REWRITES_EXPLAINED = (
    "The student's attempt y, and the teacher's rewrite z that is trained on. Long attempts that became "
    "short, and right ones that became wrong, are the two ways in which rewriting does harm."
)
FORKS_EXPLAINED = (
    "At each candidate position student and teacher go on from the same prefix; D is how far apart the two "
    "near futures are. High loss with low D is another wording of the same future, with high D a real fork."
)
MOST_POINTS = 2500
"""Forks in the scatter; the histograms count all."""
_QUANTITIES = (
    ("reverse_kl", "Reverse KL by position", "nats"),
    ("student_entropy", "Student's entropy by position", "nats"),
    ("teacher_entropy", "Teacher's entropy by position", "nats"),
    ("teacher_logp", "Teacher's log-prob of the token by position", "nats"),
)
_REWRITES = (
    ("Accuracy of y and z", "%", {"accuracy_y": "attempt y", "accuracy_z": "rewrite z"}, ""),
    ("Length ratio by step", "", {"length_ratio": "|z| / |y|"}, "Tokens of z over tokens of y."),
    (
        "Epistemic mass",
        "",
        {"epistemic_mass_y": "along y", "epistemic_mass_z": "along z"},
        "Teacher's probability of words that open a correction, mean over tokens.",
    ),
    (
        "Reverse KL along y",
        "nats",
        {"reverse_kl_y_right_nats": "y right", "reverse_kl_y_wrong_nats": "y wrong"},
        "How much of the loss comes from attempts that are wrong.",
    ),
)
_TARGETS = (
    (
        "What the targets say",
        "%",
        {
            "target_teacher_share": "the teacher's likeliest token in the student's context",
            "target_own_share": "the student's own token",
        },
        "Of the guidance's mass. The rest teaches tokens of another context: below a half it may do harm.",
    ),
    ("Entropy of the targets", "nats", {"target_entropy_nats": "mean over guided tokens"}, ""),
)
_OUTCOME = {True: "right", False: "wrong", None: "not graded"}


def of_rows(rows: Sequence[Row]) -> Iterator[Chart | None]:
    """Divergence, entropy and teacher log-prob by position and outcome."""
    for key, title, unit in _QUANTITIES:
        held = [(_OUTCOME[row.get("correct")], row[key]) for row in rows if row.get(key)]
        order = [pair for name in _OUTCOME.values() for pair in held if pair[0] == name]
        drawn = [
            charts.series(name, x, y, low=low, high=high)
            for name, x, y, low, high in charts.by_position(order)
        ]
        yield charts.lines(title, drawn, x="token of the response", unit=unit)


def of_rewrites(metrics: Sequence[Row], rows: Sequence[Row]) -> list[Chart | None]:
    """Cells as a flow, accuracies and lengths over steps, ratios of stored rewrites."""
    groups: dict[str, list[float]] = {f"attempt {name}": [] for name in _OUTCOME.values()}
    for row in rows:
        if was_changed(row) and row["response"]:
            ratio = len(row["response"]) / max(1, len(row["origin_response"]))
            groups[f"attempt {_OUTCOME[row.get('correct')]}"].append(ratio)
    ratios = charts.histogram("Length ratio of stored rewrites", groups, x="|z| / |y|")
    return [flow(metrics), ratios, *(curves(metrics, *one) for one in _REWRITES)]


def curves(metrics: Sequence[Row], title: str, unit: str, keys: Mapping[str, str], text: str) -> Chart | None:
    """Several logged numbers in one chart."""
    steps = [row["step"] for row in metrics]
    held = {key: [row.get(key) for row in metrics] for key in keys}
    drawn = [charts.series(keys[key], steps, values) for key, values in held.items() if set(values) != {None}]
    return charts.lines(title, drawn, unit=unit, help=text)


def flow(metrics: Sequence[Row]) -> Chart | None:
    """What became of right and wrong attempts, mean over the steps."""
    held = [row for row in metrics if all(row.get(cell) is not None for cell in CELLS)]
    if not held:
        return None
    shares = {cell: fmean(row[cell] for row in held) for cell in CELLS}
    text = f"Shares of all judged attempts, mean over {len(held):,} steps."
    return {"kind": "flow", "title": "From attempt to rewrite", "help": text, "cells": shares}


def of_forks(metrics: Sequence[Row], rows: Sequence[Row], truth: Truth | None) -> list[Chart | None]:
    """What the targets say over steps; loss against D with named quadrants, D by decision and by what the
    token is."""
    targets = [curves(metrics, *one) for one in _TARGETS]
    found = [(row, fork) for row in rows for fork in row["detail"].get("forks") or () if _finite(fork)]
    if not found:
        return targets
    by_decision: dict[str, list[float]] = {name: [] for name in ("surface", "fork", "too_close", "reference")}
    by_kind: dict[str, list[float]] = {}
    for row, fork in found:
        by_decision.setdefault(fork["decision"], []).append(fork["distance"])
        if truth is not None:
            kind = truth(row.get("prompt") or "", row["tokens"])[fork["position"]]
            by_kind.setdefault(kind, []).append(fork["distance"])
    return [
        scatter(found),
        charts.histogram("Distance D by decision", by_decision, x="D", help="D of all stored candidates."),
        charts.histogram(
            "Distance D by what the token is", by_kind, x="D", help="As the task's checker says."
        ),
        *targets,
    ]


def behind_errors(rows: Sequence[Row], labels: Truth | None) -> Chart | None:
    """By step: the share of the rollouts' tokens that come after the first error; None without the truth."""
    if labels is None:
        return None
    counts: dict[int, list[int]] = {}
    for row in rows:
        tokens = row.get("origin_tokens") or []
        kinds = labels(row.get("prompt") or "", tokens)
        behind = len(tokens) - 1 - kinds.index("error") if "error" in kinds else 0
        held = counts.setdefault(row["step"], [0, 0])
        held[0], held[1] = held[0] + behind, held[1] + len(tokens)
    steps = sorted(step for step, (_, tokens) in counts.items() if tokens)
    shares = [counts[step][0] / counts[step][1] for step in steps]
    return charts.lines(
        "Tokens behind the first error",
        [charts.series("rollouts", steps, shares, marks=True)] if steps else [],
        unit="%",
        help="What a correction of trajectories can change: where it falls to 0 nothing is left to correct.",
    )


def scatter(found: Sequence[tuple[Row, dict[str, Any]]]) -> Chart:
    """Candidates by loss and D. Lines: the median loss, and the D at which decisions change."""
    every = -(-len(found) // MOST_POINTS)
    points = [
        [_digits(f["loss"]), _digits(f["distance"]), f["decision"], *where, f["position"]]
        for row, f in found[::every]
        for where in [(row.get("prompt_id"), row.get("sample"), row["step"])]
    ]
    forks = [f["distance"] for _, f in found if f["decision"] == "fork"]
    surface = [f["distance"] for _, f in found if f["decision"] == "surface"]
    split = (min(forks) + max(surface)) / 2 if forks and surface else median(f["distance"] for _, f in found)
    help_text = (
        f"{len(points):,} of {len(found):,} stored candidates." if every > 1 else "Every stored candidate."
    )
    return {
        "kind": "scatter",
        "title": "Loss against distance",
        "help": help_text + " Choose a point to open its trajectory.",
        "x": "loss, nats",
        "y": "distance D",
        "points": points,
        "split": [_digits(median(f["loss"] for _, f in found)), _digits(split)],
        "quadrants": ["surface mismatch", "real fork", "agreement", "quiet fork"],
        "pearson": _digits(pearson([f["loss"] for _, f in found], [f["distance"] for _, f in found])),
    }


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of two lists; 0 where one of them does not vary.

    >>> round(pearson([1, 2, 3], [2, 4, 6]), 6)
    1.0
    """
    mx, my = fmean(x), fmean(y)
    cross = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    spread = (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5
    return cross / spread if spread else 0.0


def _finite(fork: dict[str, Any]) -> bool:
    distance = fork.get("distance")
    return isinstance(distance, float) and distance == distance and fork.get("loss") is not None


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
