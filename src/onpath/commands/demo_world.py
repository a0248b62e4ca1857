"""The demo's last part: a world in which early errors stay, and what a corrected trajectory is worth there.

    first steps are easy · most rollouts hold a wrong digit, which the student would write again ·
    behind it the teacher is lost

`recipes/when-it-pays` has the same with controls and several seeds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from onpath import config as configuration
from onpath.commands.inspect import show_row
from onpath.commands.report.text import cell, known_tokens
from onpath.commands.study.command import StudyConfig
from onpath.commands.study.tables import Sheet, measured, print_sheet
from onpath.run.trajectories import Row, read_rows, trajectory_files

NAME = "world"
BASE, REPAIRED = "opd", "relay"
ARMS: dict[str, Any] = {BASE: {}, REPAIRED: {"method": {"name": "relay"}}}
_WORLD = "late=1&spoil=0.8&again=1&lost=1"


def world_study(*, quick: bool, directory: str) -> StudyConfig:
    """The bundled student again, twice: along its own rollouts, and along repaired ones."""
    base = configuration.build(
        {
            "data": {"train": f"gym:train?{_WORLD}", "limit": 500, "eval_limit": 60 if quick else 300},
            "rollout": {"prompts": 32, "max_new_tokens": 112},
            "optim": {"lr": 2e-3, "schedule": "cosine", "warmup": 0.1, "max_grad_norm": 0.25},
            "eval": {"n": 4, "k": 4, "max_new_tokens": 112},
            "run": {"save_every": 0, "trajectories_every": 1000},
        }
    )
    return StudyConfig.model_validate(
        {
            "name": NAME,
            "dir": directory,
            "base": base,
            "arms": ARMS,
            "seeds": [0],
            "budget": {"updates": 4 if quick else 8},
            "evals": {"splits": {"hard": "gym:hard?late=1"}, "also_at": []},
        }
    )


def print_world(console: Console, study: StudyConfig, data: Mapping[str, Any]) -> None:
    """What both end with, and one rollout of the first update: as it is, and repaired."""
    console.print()
    print_sheet(console, table(data))
    console.print(
        "In four of five rollouts one digit is wrong, and would be so again if the student wrote it once "
        "more; behind an error this teacher\nknows no better than the student. OPD learns along the error; "
        "in the other arm the teacher writes that one token, and the student goes on from there.",
        highlight=False,
        soft_wrap=True,
    )
    pair = same_rollout(study)
    if pair is None:
        console.print("None among the stored trajectories.")
        return
    for title, row in zip(("OPD learns along", "the other arm learns along"), pair, strict=True):
        console.print(f"\n{title}:", style="bold", highlight=False)
        show_row(console, row, "reverse_kl", known_tokens([row]))


def table(data: Mapping[str, Any]) -> Sheet:
    """Both arms, and their difference."""
    about, arms = data["study"], data["arms"]
    count, steps = about["problems"]["hard"], max(arm["steps"] for arm in arms)
    return Sheet(
        title=f"A world in which errors stay: {steps} updates each; {count:,} hard problems, all unseen",
        columns=("", f"avg@{about['n']}", "95%", f"− {BASE}", "95%", ""),
        rows=tuple((arm["arm"], *measured(arm["evals"]["hard"]["avg_at_k"])) for arm in arms),
    )


def same_rollout(study: StudyConfig) -> tuple[Row, Row] | None:
    """One rollout of the first update, before the arms part, in both arms: wrong as it was, right when
    repaired, with the fewest tokens."""
    plain = {key(row): row for row in first_update(study, BASE)}
    found = [
        (plain[key(row)], row)
        for row in first_update(study, REPAIRED)
        if key(row) in plain and row["kept"] and cell(row) == "wrong_to_right"
    ]
    return min(found, key=lambda pair: len(pair[1]["tokens"]), default=None)


def key(row: Row) -> tuple[Any, Any]:
    """The rollout that a stored trajectory came from."""
    return row["prompt_id"], row["sample"]


def first_update(study: StudyConfig, arm: str) -> Iterator[Row]:
    """What was stored of it."""
    for path in trajectory_files(study.directory / "runs" / f"{arm}-seed0")[:1]:
        yield from read_rows(path)
