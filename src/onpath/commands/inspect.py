"""`onpath inspect`: stored trajectories on a terminal or as JSON lines."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from onpath.commands.report.text import cell, known_tokens, sides, was_changed
from onpath.commands.terminal import coloured, few_colours, forks, left_out, legend, rewritten, written
from onpath.run.trajectories import Row, quantities, read_rows, step_of, trajectory_files
from onpath.system.errors import UserError
from onpath.system.files import place

_SHOWN = 12
"""Stored steps that an error lists in full."""
VERDICTS = {True: "right", False: "wrong", None: "not graded"}
ONLY: dict[str, Callable[[Row], bool]] = {
    "right": lambda row: row["correct"] is True,
    "wrong": lambda row: row["correct"] is False,
    "repaired": lambda row: cell(row) == "wrong_to_right",
    "harmed": lambda row: cell(row) == "right_to_wrong",
    "edited": lambda row: row["edit"] != "none",
    "dropped": lambda row: not row["kept"],
    "forks": lambda row: any(f["decision"] == "fork" for f in row["detail"].get("forks") or ()),
}
"""What rows can be filtered by."""
_SORT_KEYS: dict[str, Callable[[Row], float]] = {
    "kl": lambda row: -max(row.get("reverse_kl") or [0.0]),
    "length": lambda row: -len(row["response"]),
}


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """The trajectories asked for."""

    rows: tuple[Row, ...]
    """As `onpath.run.trajectories.trajectory_row` stored them, `detail` parsed."""
    colour: str
    """The per-token quantity to colour by."""
    tokens: Mapping[int, str]
    """Token ids of the step → their text, as far as they are known."""


def run_inspect(
    directory: str | Path,
    *,
    step: int | None = None,
    only: str | None = None,
    prompt_id: str | None = None,
    sort: str = "stored",
    colour: str | None = None,
    limit: int | None = 5,
) -> Inspected:
    """Reads what a run trained on.

    Args:
        directory: of the run.
        step: None: the last stored one.
        only: one of `ONLY`: by verdict, wrong → right, right → wrong, rewritten, not trained on, with forks.
        prompt_id: only trajectories of this prompt.
        sort: stored, kl or length, the largest first.
        colour: a per-token column; None: reverse_kl, or the first that there is.
        limit: how many; None: all.

    Raises:
        UserError: no such run, step, column or prompt, or a damaged file.
    """
    stored = stored_rows(place(directory), step)
    names = sorted({name for row in stored for name in quantities(row)} | {"weights"})
    if names and colour not in (None, *names):
        raise UserError(f"colour {colour}: no such per-token column; there are {', '.join(names)}")
    rows = select(stored, only=only, prompt_id=prompt_id, sort=sort, limit=limit)
    return Inspected(rows=tuple(rows), colour=colour or default_colour(rows), tokens=known_tokens(stored))


def default_colour(rows: Sequence[Row]) -> str:
    """reverse_kl where it was measured, else the first quantity that was."""
    names = sorted({name for row in rows for name in quantities(row)})
    return "reverse_kl" if "reverse_kl" in names or not names else names[0]


def stored_rows(directory: Path, step: int | None) -> list[Row]:
    """All rows of a step; None: of the last one.

    Raises:
        UserError: no such run, nothing stored, no such step, or a damaged file.
    """
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: not a run directory (it has no config.yaml)")
    files = {step_of(path): path for path in trajectory_files(directory)}
    if not files:
        raise UserError(f"{directory}: no stored trajectories; train with run.trajectories_every above 0")
    if step is not None and step not in files:
        stored = [str(number) for number in sorted(files)]
        shown = stored if len(stored) <= _SHOWN else [*stored[:3], "…", stored[-1]]
        raise UserError(f"step {step} is not stored; there are {', '.join(shown)}")
    return list(read_rows(files[max(files) if step is None else step], contexts=True))


def select(
    rows: Sequence[Row], *, only: str | None, prompt_id: str | None, sort: str, limit: int | None
) -> list[Row]:
    """Rows after the filters, in the order asked for, as many as asked for.

    Raises:
        UserError: no such filter, order or prompt.
    """
    if only is not None and only not in ONLY:
        raise UserError(f"only is {only!r}; it must be one of {', '.join(ONLY)}")
    if sort != "stored" and sort not in _SORT_KEYS:
        raise UserError(f"sort is {sort!r}; it must be one of stored, {', '.join(_SORT_KEYS)}")
    if prompt_id is not None and all(row["prompt_id"] != prompt_id for row in rows):
        first = f"; the first one is {rows[0]['prompt_id']!r}" if rows else ""
        raise UserError(f"id {prompt_id}: no such prompt at this step{first}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; ask for 1 or more")
    matching = [r for r in rows if only is None or ONLY[only](r)]
    matching = [r for r in matching if prompt_id in (None, r["prompt_id"])]
    if sort != "stored":
        matching.sort(key=_SORT_KEYS[sort])
    return matching[:limit]


def print_inspected(console: Console, found: Inspected) -> None:
    """The trajectories one below the other."""
    if not found.rows:
        console.print("no stored trajectory matches", highlight=False)
        return
    console.print(legend(console, found.colour))
    for row in found.rows:
        show_row(console, row, found.colour, found.tokens)


def show_row(console: Console, row: Row, quantity: str, known: Mapping[int, str]) -> None:
    """One trajectory: problem, verdict, edit, tokens, what was changed, forks with both futures."""
    colour = console.color_system is not None
    console.print()
    console.print(Text(str(row["prompt"]), style="bold"), Text(f"   answer {row['answer']}", style="dim"))
    console.print(Text("  ".join(facts(row)), style="dim"))
    values = row.get(quantity)
    if values is None:  # recorded only: not scored
        say(console, [Text(row["response_text"])])
    else:
        weights = row.get("weights") if quantity != "weights" else None
        few = few_colours(console)
        say(
            console,
            [coloured(row["tokens"], values, weights=weights, quantity=quantity, colour=colour, few=few)],
        )
    say(console, written(row["tokens"], row.get("writers") or (), colour=colour))
    if row["kept"]:
        say(console, left_out(row["tokens"], row.get("weights") or (), colour=colour))
    if was_changed(row):
        say(console, rewritten(*sides(row, known), colour=colour))
    say(console, forks(row["detail"].get("forks") or (), colour=colour))


def facts(row: Row) -> list[str]:
    """What stands above the tokens."""
    verdict = cell(row).replace("_to_", " → ") if was_changed(row) else VERDICTS[row["correct"]]
    edit = f"edit {row['edit']} {row['reason']}".rstrip()
    told = row["detail"].items() if row["edit"] == "none" else ()
    known = [f"{key} {value}" for key, value in told if isinstance(value, str | int | float)]
    return [f"step {row['step']}", str(row["prompt_id"]), verdict, str(row["finish_reason"]), edit, *known]


def say(console: Console, lines: Iterable[Text]) -> None:
    """Text as it is: no markup, no wrapping of ours."""
    for line in lines:
        console.print(line, soft_wrap=True)
