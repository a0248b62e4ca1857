"""A study's results as tables: on the terminal and in Markdown, from the same cells."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

HOW = (
    "avg@n is the share of all samples that are right, pass@k the unbiased estimate for k of them. Intervals "
    "are 95%. With two or more seeds they cover problems and seeds (crossed random effects: two-way analysis "
    "of variance, t, from four seeds on with Satterthwaite's degrees of freedom); with one seed, problems "
    "only (bootstrap). "
    "Differences are paired: the same problems, the same seeds. *higher* and *lower* hold at 5% after Holm's "
    "correction over the arms of a table; all else is inside the noise, whatever the order of the means."
)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A titled table of text; the first column is left-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets(data: Row) -> Iterator[Sheet]:
    """All tables of a study."""
    for split in data["study"]["splits"]:
        for measure in ("avg_at_k", "pass_at_k"):
            if measure == "avg_at_k" or data["study"]["samples"][split] > 1:
                yield _scores(data, split, measure)
    if any(arm["evals"][s]["first_errors"] for arm in data["arms"] for s in data["study"]["splits"]):
        yield _first_errors(data)
    yield _costs(data)
    if data["tuning"]:
        yield _tuning(data)


def _scores(data: Row, split: str, measure: str) -> Sheet:
    study, base = data["study"], data["study"]["base_arm"]
    samples = study["samples"][split]
    name = f"avg@{samples}" if measure == "avg_at_k" else f"pass@{min(samples, study['k'])}"
    return Sheet(
        title=f"{split}, {name}: {study['problems'][split]:,} problems, {samples} samples each",
        columns=("arm", "seeds", name, "95%", f"− {base}", "95%", "", "length"),
        rows=tuple(
            (
                arm["arm"],
                str(len(arm["seeds"]) or "-"),
                *measured(arm["evals"][split][measure]),
                f"{arm['evals'][split]['mean_length']:.1f}",
            )
            for arm in data["arms"]
        ),
    )


def _first_errors(data: Row) -> Sheet:
    """What goes wrong first, by arm and evaluation: shares of all samples."""
    found = [(s, arm, arm["evals"][s]) for s in data["study"]["splits"] for arm in data["arms"]]
    kinds = sorted({kind for _, _, held in found for kind in held["first_errors"] or {}})
    return Sheet(
        title="Kinds of first errors, as shares of all samples; together they make what is wrong",
        columns=("split, arm", "wrong", *kinds),
        rows=tuple(
            (
                f"{split}, {arm['arm']}",
                f"{1 - held['avg_at_k']['mean']:.1%}",
                *(f"{held['first_errors'].get(kind, 0):.1%}" for kind in kinds),
            )
            for split, arm, held in found
            if held["first_errors"] is not None
        ),
    )


def measured(row: Row) -> tuple[str, ...]:
    """Mean, interval, difference from the base arm, its interval, verdict."""
    gap = row["difference"]
    own = (f"{row['mean']:.1%}", _interval(row["ci95"]))
    if gap is None:
        return (*own, "", "", "")
    return (*own, f"{gap['mean']:+.1%}", _interval(gap["ci95"], signed=True), gap["verdict"])


def _interval(bounds: Sequence[float], *, signed: bool = False) -> str:
    low, high = (f"{100 * b:+.1f}" if signed else f"{100 * b:.1f}" for b in bounds)
    return f"{low} to {high}"


def _costs(data: Row) -> Sheet:
    return Sheet(
        title="cost, mean per run",
        columns=(
            "arm",
            "steps",
            "lr",
            "tokens updated",
            "written by student",
            "written by teacher",
            "training s",
        ),
        rows=tuple(
            (
                arm["arm"],
                f"{arm['steps']:,}",
                f"{arm['lr']:g}",
                f"{arm['updated_tokens']:,.0f}",
                f"{arm['tokens_generated_student']:,.0f}",
                f"{arm['tokens_generated_teacher']:,.0f}",
                f"{arm['wall_seconds']:,.1f}",
            )
            for arm in data["arms"]
            if arm["kind"] == "train"
        ),
    )


def _tuning(data: Row) -> Sheet:
    rates = sorted({tried["lr"] for arm in data["tuning"] for tried in arm["grid"]})
    tune = data["study"]["tune"]
    counts = [tried.get("problems") for arm in data["tuning"] for tried in arm["grid"]]
    problems = next((count for count in counts if count), tune["limit"])
    return Sheet(
        title=f"learning rates: avg@{tune['n']} on {problems:,} problems of {tune['split']}",
        columns=("arm", *(f"{rate:g}" for rate in rates), "chosen"),
        rows=tuple(
            (
                arm["arm"],
                *(_score_at(arm, rate) for rate in rates),
                "none" if arm["chosen"] is None else f"{arm['chosen']:g}{' (edge)' * arm['at_edge']}",
            )
            for arm in data["tuning"]
        ),
    )


def _score_at(arm: Row, rate: float) -> str:
    score = next((tried["avg_at_k"] for tried in arm["grid"] if tried["lr"] == rate), None)
    return "failed" if score is None else f"{score:.1%}"


def sentences(data: Row) -> list[str]:
    """Who is ahead, if anybody is."""
    said = []
    for split, row in data["leaders"].items():
        if row is None:
            continue
        aside = f", {' and '.join(row['without'])} aside" if row.get("without") else ""
        rest = _lead(row, seeds=len(data["study"]["seeds"]))
        said.append(f"{split}{aside}: the highest mean is {row['highest']}'s, {row['mean']:.1%}; {rest}.")
    return said


def _lead(row: Row, *, seeds: int) -> str:
    """Whether the arm with the highest mean is ahead; earlier versions did not say who has one seed only."""
    few, near = row.get("too_few_pairs"), row["not_told_apart"]
    if few:
        who = f"{' and '.join(few)} {'has' if len(few) == 1 else 'have'} no two seeds in common with it"
        others = [arm for arm in near if arm not in few]
        also = f"; nor told apart from it: {', '.join(others)}" if others else ""
        return f"no winner: {who}, and one does not say what another would have given{also}"
    if few is None and row.get("pairs", seeds) < 2:
        return "no winner: one seed does not say what another would have given"
    return f"no winner: not told apart from it: {', '.join(near)}" if near else "ahead of every other arm"


def print_study(console: Console, data: Row) -> None:
    """Tables, sentences and notes on a terminal."""
    for sheet in sheets(data):
        print_sheet(console, sheet)
    for text in [*sentences(data), *(f"note: {note}" for note in data["notes"])]:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_sheet(console: Console, sheet: Sheet) -> None:
    """One table on a terminal, and a free line."""
    console.print(sheet.title, style="bold", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for place, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in sheet.rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def markdown(data: Row) -> str:
    """study.md."""
    study, machine = data["study"], data["environment"]
    parts = [f"# {study['name']}", f"`{study['command']}`", HOW]
    budget = study["budget"]
    stop = "optim.steps of the config" if budget is None else f"{budget['amount']:,} {budget['measure']}"
    parts.append(
        f"Budget: {stop}. Seeds: {', '.join(map(str, study['seeds']))}. Grader: {study['grader']}. "
        f"Device: {machine['device']}, threads of each run: {machine['threads']}. "
        f"Commit: {machine['git_commit'] or 'unknown'}."
    )
    parts.append(
        "\n".join(f"- {text}" for text in [*sentences(data), *(f"Note: {n}" for n in data["notes"])])
    )
    for sheet in sheets(data):
        lines = [sheet.columns, ("---", *["--:"] * (len(sheet.columns) - 1)), *sheet.rows]
        parts.append(f"## {sheet.title}")
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(part for part in parts if part) + "\n"
