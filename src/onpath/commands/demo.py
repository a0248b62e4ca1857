"""`onpath demo`: OPD, TRD and TOPD from one start, side by side, and what one can see of each; then a world
in which a repaired trajectory wins (`demo_world.py`).

Studies of one seed (`onpath.study`), their tables, trajectories, a picture and a page (`onpath.report`).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.text import Text

from onpath import config as configuration
from onpath import gym
from onpath.commands.demo_world import print_world, world_study
from onpath.commands.inspect import show_row
from onpath.commands.picture import picture
from onpath.commands.report.command import write_report
from onpath.commands.report.text import cell, known_tokens
from onpath.commands.study.command import StudyConfig, carry_out
from onpath.commands.study.jobs import LOCK, locked
from onpath.commands.study.tables import Sheet, measured, print_sheet, sentences
from onpath.commands.terminal import coloured, legend
from onpath.run.log import read_lines
from onpath.run.trajectories import Row, read_rows, trajectory_files
from onpath.system.errors import UserError
from onpath.system.files import place, remove_all_but
from onpath.system.reading import read_yaml

NAME = "demo"
BEFORE = "before"
ARMS = {
    BEFORE: "untouched",
    "opd": {},
    "trd": {"method": {"name": "trd"}},
    "topd": {"method": {"name": "topd", "window": 24}},  # two steps of a solution
}
_COLOURS = {"before": "#777777", "opd": "#0072B2", "trd": "#D55E00", "topd": "#009E73"}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What a demo leaves."""

    study: StudyConfig
    data: Mapping[str, Any]
    """What its study.json holds."""
    world: StudyConfig
    world_data: Mapping[str, Any]
    picture: Path
    page: Path
    seconds: float
    """That it took."""


def demo(*, quick: bool = False, directory: str | Path = "runs") -> Demo:
    """Trains and evaluates all of them, draws the picture and writes the page.

    Args:
        quick: fewer updates and fewer problems.
        directory: where the directory `demo` goes; the one of an earlier demo is replaced.

    Raises:
        UserError: there is a directory of that name which is no demo's, or a run failed.
    """
    begun = time.monotonic()
    study = demo_study(quick=quick, directory=str(place(directory, key="--dir")))
    clear(study)
    command = "onpath demo --quick" if quick else "onpath demo"
    found = carry_out(study, command=command)
    found.check()
    world = world_study(quick=quick, directory=str(study.directory))
    there = carry_out(world, command=command)
    there.check()
    return Demo(
        study=study,
        data=found.data,
        world=world,
        world_data=there.data,
        picture=draw(study.directory, found.data),
        page=write_report(study.directory),
        seconds=time.monotonic() - begun,
    )


def clear(study: StudyConfig) -> None:
    """Removes what an earlier demo left: a demo starts anew each time.

    Raises:
        UserError: what is there is no demo's, or a demo is at work in it.
    """
    if not study.directory.exists():
        return
    if not _is_demo(study.directory):
        raise UserError(
            f"{study.directory} is not an earlier demo's: move it away, or choose another directory"
        )
    with locked(study.directory):
        remove_all_but(study.directory / LOCK)  # the file that others wait for


def _is_demo(directory: Path) -> bool:
    """Whether its study has the demo's arms: somebody's own study may be called demo."""
    path = directory / "study.yaml"
    found = read_yaml(path) if path.is_file() else None
    if not isinstance(found, dict) or not isinstance(found.get("arms"), dict):
        return False
    return found["arms"].keys() == ARMS.keys() and found.get("base_arm") == BEFORE


def print_demo(console: Console, made: Demo) -> None:
    """Tables, sentences, trajectories, and where the rest is."""
    console.print()
    print_sheet(console, table(made.data))
    for text in [*sentences(made.data), *made.data["notes"]]:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    print_trajectories(console, made.study)
    print_world(console, made.world, made.world_data)
    where = f"page {made.page}   picture {made.picture}   {made.seconds:.0f} s"
    console.print(f"\n{where}", highlight=False, soft_wrap=True)


def demo_study(*, quick: bool, directory: str) -> StudyConfig:
    """The bundled student, three methods, the same prompts and as many updates; unseen problems."""
    base = configuration.build(
        {
            "data": {"limit": 1000, "eval_limit": 100 if quick else 500},
            "rollout": {"prompts": 64, "max_new_tokens": 112},
            "optim": {"lr": 2e-3, "schedule": "cosine", "warmup": 0.1},
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
            "base_arm": BEFORE,
            "seeds": [0],
            "budget": {"updates": 6 if quick else 30},
            "evals": {"splits": {"test": "gym:test", "hard": "gym:hard"}, "also_at": []},
        }
    )


def table(data: Mapping[str, Any]) -> Sheet:
    """Both splits, before and after each method."""
    about, steps = data["study"], max(arm["steps"] for arm in data["arms"])
    problems = " and ".join(f"{count:,} {split}" for split, count in about["problems"].items())
    return Sheet(
        title=f"{steps} updates each; {problems} problems, all unseen, {about['n']} samples each at T = 1",
        columns=("", f"avg@{about['n']}", "95%", "gain", "95%", "", f"pass@{about['k']}"),
        rows=tuple(
            (
                f"{split}, {arm['arm']}",
                *measured(arm["evals"][split]["avg_at_k"]),
                f"{arm['evals'][split]['pass_at_k']['mean']:.1%}",
            )
            for split in about["splits"]
            for arm in data["arms"]
        ),
    )


def print_trajectories(console: Console, study: StudyConfig) -> None:
    """A problem before and after, a rewrite, a fork."""
    console.print()
    console.print(legend(console, "reverse KL at the token"))
    console.print("\n1. An unseen problem, by the student before and after.", style="bold", soft_wrap=True)
    print_problem(console, study)
    for number, title, found in (
        (
            2,
            "TRD: the student's attempt y, and the teacher's rewrite z that it learns from.",
            repaired(study),
        ),
        (3, "TOPD: a real fork: how the student went on, and how the teacher would have.", forked(study)),
    ):
        console.print(f"\n{number}. {title}", style="bold", highlight=False, soft_wrap=True)
        if found is None:
            console.print("None among the stored trajectories.")
        else:
            show_row(console, found, "reverse_kl", known_tokens([found]))


def stored(study: StudyConfig, arm: str) -> Iterator[Row]:
    """Trajectories of the first and the last update."""
    for path in trajectory_files(run_of(study.directory, arm)):
        yield from read_rows(path)


def run_of(directory: Path, arm: str) -> Path:
    """An arm's only run."""
    return directory / "runs" / (arm if arm == BEFORE else f"{arm}-seed0")


def repaired(study: StudyConfig) -> Row | None:
    """The wrong attempt that the fewest changes made right: what is left of the diff is the error."""
    rows = [row for row in stored(study, "trd") if cell(row) == "wrong_to_right"]
    return min(rows, key=lambda row: row["detail"]["edit_distance"], default=None)


def forked(study: StudyConfig) -> Row | None:
    """The fork with the largest distance, preferably at an error, alone in its trajectory."""
    found = [(row, f) for row in stored(study, "topd") for f in row["detail"].get("forks") or ()]
    forks = [pair for pair in found if pair[1]["decision"] == "fork"]
    if not forks:
        return None
    row, fork = max(forks, key=lambda pair: (_is_error(*pair), pair[1]["distance"]))
    return {**row, "detail": {**row["detail"], "forks": [fork]}}


def _is_error(row: Row, fork: Mapping[str, Any]) -> bool:
    return str(gym.label_tokens(row["prompt"], row["tokens"])[fork["position"]].kind) == "error"


def print_problem(console: Console, study: StudyConfig) -> None:
    """A test problem that was wrong before and that the most methods set right; first samples."""
    samples = {arm: first_samples(run_of(study.directory, arm)) for arm in ARMS}
    key = most_telling(samples)
    if key is None:
        console.print("None was wrong before and right after.")
        return
    reader = Reader(study, key)
    console.print(
        Text(reader.prompt.question, style="bold"), Text(f"   (answer {reader.prompt.answer})", style="dim")
    )
    for arm, rows in samples.items():
        tokens, values = reader.read(arm, rows[key]["ids"])
        error = gym.first_error_token(reader.prompt.question, tokens)
        marked = [f"▸{t}" if i == error else t for i, t in enumerate(tokens)]
        verdict = (
            Text("  ✓", style="green") if rows[key]["correct"] else Text("  ✗ first error at ▸", style="red")
        )
        text = coloured(marked, values, colour=console.color_system is not None)
        console.print(Text(f"  {arm:<7}"), text, verdict, sep="", soft_wrap=True)


def first_samples(run: Path) -> dict[str, Row]:
    """Problem → its first sample at the last evaluation on test."""
    path = sorted((run / "evals").glob("test_step_*.parquet"))[-1]
    return {row["id"]: row for row in pq.read_table(path).to_pylist() if row["sample"] == 0}


def most_telling(samples: Mapping[str, Mapping[str, Row]]) -> str | None:
    """The problem with a wrong start and the most right ends; of equal ones the longest wrong start."""
    wrong = {key: row for key, row in samples[BEFORE].items() if not row["correct"]}
    rights = {
        key: sum(rows[key]["correct"] for arm, rows in samples.items() if arm != BEFORE) for key in wrong
    }
    key = max(wrong, key=lambda k: (rights[k], wrong[k]["length"], k), default=None)
    return key if key is not None and rights[key] else None


class Reader:
    """Reads responses to one problem with the models of the demo: torch is loaded only now."""

    def __init__(self, study: StudyConfig, key: str) -> None:
        from onpath.data.load import load_prompts
        from onpath.data.render import Renderer
        from onpath.engines.models import load_model, load_tokenizer, pick_device

        self.study, self.device, base = study, pick_device("auto", NAME), study.base
        prompts = load_prompts("gym:test", limit=base.data.eval_limit).prompts
        self.prompt = next(p for p in prompts if p.id == key)
        self.renderer = Renderer(load_tokenizer(base.student, NAME))
        self.teacher = load_model(configuration.Student(model="gym:teacher"), NAME, self.device)

    def read(self, arm: str, ids: Sequence[int]) -> tuple[list[str], list[float]]:
        """Tokens, and reverse KL of the arm's student from the teacher at each, nats."""
        from onpath.engines.forward import Models, per_token
        from onpath.engines.models import load_model
        from onpath.engines.teacher import ModelTeacher
        from onpath.records import Trajectory

        model = "gym:student" if arm == BEFORE else str(run_of(self.study.directory, arm) / "model")
        student = load_model(configuration.Student(model=model), NAME, self.device)
        models = Models(
            student=student,
            teacher=ModelTeacher(self.teacher),
            vocabulary=student.config.vocab_size,
            device=student.device,
            max_tokens=16_384,
        )
        context = self.renderer.ids(self.prompt)
        read = Trajectory(student_context=context, teacher_context=context, response=tuple(ids))
        (values,) = per_token(models, [read])
        return self.renderer.tokens(ids), values["reverse_kl"]


def draw(directory: Path, data: Mapping[str, Any]) -> Path:
    """Accuracy of the rollouts by update, and final accuracies with their intervals, as a PNG."""
    path = directory / "demo.png"
    about, arms = data["study"], data["arms"]
    with picture(path, size=(9, 3.4), columns=2) as (_, (left, right)):
        for slot, arm in enumerate(arms):
            colour = _COLOURS[arm["arm"]]
            rows = read_lines(run_of(directory, arm["arm"]) / "metrics.jsonl")
            if rows:
                left.plot(
                    [r["step"] for r in rows], [r["accuracy"] for r in rows], color=colour, label=arm["arm"]
                )
            held = [arm["evals"][split]["avg_at_k"] for split in about["splits"]]
            means = [h["mean"] for h in held]
            bars = [[h["mean"] - h["ci95"][0] for h in held], [h["ci95"][1] - h["mean"] for h in held]]
            x = [split + 0.16 * (slot - (len(arms) - 1) / 2) for split in range(len(held))]
            right.errorbar(x, means, yerr=bars, fmt="o", capsize=3, color=colour, label=arm["arm"])
        left.set(xlabel="update", ylabel="share right", ylim=(0, 1), title="The student's rollouts")
        right.set(ylim=(0, 1), title=f"Unseen problems: avg@{about['n']}, 95% over problems")
        right.set_xticks(range(len(about["splits"])), about["splits"])
        for axis in (left, right):
            axis.legend(frameon=False, fontsize=8)
            axis.grid(alpha=0.3)
    return path
