"""`onpath gym`: write the tasks, make the bundled models anew, measure the gym's properties."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from onpath.gym.maze.task import MazeTask
from onpath.gym.maze.tasks import rows as maze_rows
from onpath.gym.models import Role, model_dir
from onpath.gym.tasks import SIZES, rows
from onpath.system.arguments import Parser
from onpath.system.errors import UserError
from onpath.system.files import make_directory, place, write_text

_ROWS = {"gym": rows, "maze": maze_rows}
_BUNDLED: dict[str, Callable[[Role], Path]] = {"gym": model_dir, "maze": MazeTask().model}


def parser() -> argparse.ArgumentParser:
    """The command line of `onpath gym`."""
    top = Parser(prog="onpath gym", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    tasks = commands.add_parser("tasks", help="write problems as JSON lines: id, prompt, answer, solution")
    tasks.add_argument("--task", choices=sorted(_ROWS), default="gym", help="whose (default: gym)")
    tasks.add_argument("--split", choices=sorted(SIZES), default="train", help="which split (default: train)")
    tasks.add_argument("--n", type=int, default=500, help="how many problems (default: 500)")
    tasks.add_argument("--seed", type=int, default=0, help="same seed, same problems (default: 0)")
    tasks.add_argument("--out", help="file to write (default: standard output)")
    train = commands.add_parser("train", help="make bundled models anew")
    train.add_argument("--out", required=True, help="directory for teacher/ and student/")
    train.add_argument(
        "--models",
        choices=("gym", "maze", "surface", "persona"),
        default="gym",
        help="the gym's pair, the maze's, the gym's student without its habits, or the teacher that is lost "
        "behind an error (default: gym)",
    )
    train.add_argument("--seed", type=int, default=0, help="of weights and demonstrations (default: 0)")
    train.add_argument("--quick", action="store_true", help="a run of seconds that only shows that it works")
    measure = commands.add_parser("measure", help="measure the properties that a task's README gives")
    measure.add_argument("--task", choices=sorted(_ROWS), default="gym", help="whose (default: gym)")
    measure.add_argument("--models", help="directory with teacher/ and student/ (default: bundled)")
    measure.add_argument("--out", help="directory for properties.json and properties.md")
    measure.add_argument("--scale", type=float, default=1.0, help="factor on all sample sizes (default: 1)")
    return top


def run(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code."""
    arguments = vars(parser().parse_args(argv))
    actions: dict[str, Callable[..., None]] = {"tasks": _tasks, "train": _train, "measure": _measure}
    actions[arguments.pop("command")](**arguments)
    return 0


def _tasks(*, task: str, split: str, n: int, seed: int, out: str | None) -> None:
    path = None if out is None else place(out, key="--out")
    if n < 1:
        raise UserError(f"--n must be at least 1, not {n}")
    try:
        text = "".join(json.dumps(row) + "\n" for row in _ROWS[task](split, n, seed))
    except ValueError as error:  # a split of the other task
        raise UserError(f"--split: {error}") from None
    if path is None:
        sys.stdout.write(text)
    else:
        write_text(path, text)
        print(f"{n} problems: {path}")


def _train(*, out: str, models: str, seed: int, quick: bool) -> None:
    from onpath.gym import persona, recipe, surface
    from onpath.gym.maze import recipe as maze

    made = {
        "gym": recipe.make_models,
        "maze": maze.make_models,
        "surface": surface.make_student,
        "persona": persona.make_persona,
    }
    directory = place(out, key="--out")
    make_directory(directory)
    made[models](directory, seed=seed, quick=quick)


def _measure(*, task: str, models: str | None, out: str | None, scale: float) -> None:
    from onpath.gym import properties
    from onpath.gym.maze import properties as maze

    if not 0 < scale < math.inf:
        raise UserError(f"--scale must be above 0, not {scale:g}")
    roles: tuple[Role, ...] = ("teacher", "student")
    directory, given = (
        None if x is None else place(x, key=key) for x, key in ((out, "--out"), (models, "--models"))
    )
    home: dict[str, Path] = {role: given / role if given else _BUNDLED[task](role) for role in roles}
    for role, path in home.items():
        if not (path / "config.json").is_file():
            raise UserError(f"no {role} in {path}; `onpath gym train --models {task} --out DIR` makes one")
    if directory is not None:
        make_directory(directory)
    numbers = {"gym": properties, "maze": maze}[task].measure(
        home, scale=scale, log=lambda line: print(line, file=sys.stderr)
    )
    print(properties.markdown(numbers))
    if directory is not None:
        properties.write(numbers, directory)
