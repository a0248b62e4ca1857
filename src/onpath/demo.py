"""`onpath demo`: the bundled student learns from the bundled teacher, and one can see what changed."""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from onpath import config as configuration
from onpath import gym
from onpath.config import Config, Student
from onpath.data import load_prompts
from onpath.evaluate import compare
from onpath.log import read_lines
from onpath.measure import Measure
from onpath.models import load_model, load_tokenizer, pick_device
from onpath.records import Trajectory
from onpath.render import Renderer
from onpath.show import coloured, legend
from onpath.teacher import ModelTeacher
from onpath.train import train

NAME = "demo"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One unseen problem before and after: the first sample of each."""

    id: str
    before: dict[str, Any]
    after: dict[str, Any]


def demo(*, quick: bool, directory: str) -> int:
    """Trains, evaluates, prints a table and three trajectories, draws the curve. Returns the exit code."""
    begun = time.monotonic()
    console = Console(file=sys.stdout)
    config = demo_config(quick=quick, directory=directory)
    shutil.rmtree(Path(directory) / NAME, ignore_errors=True)  # a demo starts anew each time
    result = train(config)
    run = result.directory
    _print_table(console, run, config)
    _print_trajectories(console, run, config)
    picture = draw_curve(run)
    console.print(f"\nrun {run}   picture {picture}   {time.monotonic() - begun:.0f} s", highlight=False)
    return 0


def demo_config(*, quick: bool, directory: str) -> Config:
    """OPD on the gym with a pool of 1,000 prompts; unseen test and hard problems."""
    return configuration.build(
        {
            "data": {
                "limit": 1000,
                "eval": {"test": "gym:test", "hard": "gym:hard"},
                "eval_limit": 150 if quick else 500,
            },
            "rollout": {"prompts": 64, "max_new_tokens": 112},
            "optim": {"steps": 12 if quick else 60, "lr": 1e-3},
            "eval": {"n": 4, "k": 4, "max_new_tokens": 112, "every": 0 if quick else 20},
            "run": {"name": NAME, "dir": directory, "save_every": 0, "trajectories_every": 0},
        }
    )


def _print_table(console: Console, run: Path, config: Config) -> None:
    lines = read_lines(run / "eval.jsonl")
    last = config.optim.steps
    table = Table(
        title="OPD on the gym: unseen problems, 4 samples each, T = 1", title_justify="left", box=None
    )
    for column in ("", "avg@4", "95% interval", "pass@4", "problems"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for split in config.data.eval:
        for step, label in ((0, "before"), (last, "after")):
            row = next(r for r in lines if r["split"] == split and r["step"] == step)
            low, high = row["ci95"]
            interval = f"{low:.1%} to {high:.1%}"
            table.add_row(
                f"{split}, {label}",
                f"{row['avg_at_k']:.1%}",
                interval,
                f"{row['pass_at_k']:.1%}",
                f"{row['problems']:,}",
            )
        gain = compare(*(run / "evals" / f"{split}_step_{s:06d}.jsonl" for s in (last, 0)))
        low, high = gain.ci95
        table.add_row(f"{split}, gain", f"{gain.difference:+.1%}", f"{low:+.1%} to {high:+.1%}", "", "")
    console.print()
    console.print(table)
    kl = [r["reverse_kl_nats"] for r in read_lines(run / "metrics.jsonl")]
    console.print(f"reverse KL per token: {kl[0]:.3f} → {kl[-1]:.3f} nats", highlight=False)


def _print_trajectories(console: Console, run: Path, config: Config) -> None:
    """The three problems that changed most: wrong before, right after, the largest KL at one token."""
    pairs = _pairs(run, config.optim.steps)
    prompts = {p.id: p for p in load_prompts("gym:test", limit=config.data.eval_limit).prompts}
    section, device = Student(), pick_device("auto", "demo")
    student, teacher = (load_model(Student(model=m), "demo", device) for m in ("gym:student", "gym:teacher"))
    trained = load_model(Student(model=str(run / "model")), "demo", device)
    renderer = Renderer(load_tokenizer(section, "demo"))
    contexts = [renderer.ids(prompts[p.id]) for p in pairs]
    before = _kl(student, teacher, [(c, p.before["ids"]) for c, p in zip(contexts, pairs, strict=True)])
    order = sorted(range(len(pairs)), key=lambda i: -max(before[i]))[:3]
    after = _kl(trained, teacher, [(contexts[i], pairs[i].after["ids"]) for i in order])
    console.print()
    console.print(legend(console, "reverse KL at the token"))
    for i, values in zip(order, after, strict=True):
        prompt = prompts[pairs[i].id]
        console.print(
            Text(f"\n{prompt.question}", style="bold"), Text(f"   (answer {prompt.answer})", style="dim")
        )
        _print_one(console, "before", renderer.tokens(pairs[i].before["ids"]), before[i], prompt.question)
        _print_one(console, "after ", renderer.tokens(pairs[i].after["ids"]), values, prompt.question)


def _kl(
    student: PreTrainedModel, teacher: PreTrainedModel, pairs: Sequence[tuple[tuple[int, ...], Sequence[int]]]
) -> list[list[float]]:
    """Reverse KL per response token, nats."""
    measure = Measure(
        student=student,
        teacher=ModelTeacher(teacher),
        vocabulary=student.config.vocab_size,
        device=student.device,
        max_tokens=16_384,
    )
    read = [Trajectory(student_context=c, teacher_context=c, response=tuple(r)) for c, r in pairs]
    return [values["reverse_kl"] for values in measure(read)]


def _print_one(
    console: Console, label: str, tokens: Sequence[str], values: Sequence[float], question: str
) -> None:
    error = gym.first_error_token(question, list(tokens))
    marked = [f"▸{t}" if i == error else t for i, t in enumerate(tokens)]
    verdict = Text("  ✓", style="green") if error is None else Text("  ✗ first error at ▸", style="red")
    text = coloured(marked, values, colour=console.color_system is not None)
    console.print(Text(f"  {label} "), text, verdict, sep="", soft_wrap=True)


def _pairs(run: Path, last: int) -> list[Pair]:
    """First samples of the test problems that were wrong before and are right after."""
    rows = {
        step: {
            r["id"]: r
            for r in pq.read_table(run / "evals" / f"test_step_{step:06d}.parquet").to_pylist()
            if r["sample"] == 0
        }
        for step in (0, last)
    }
    return [
        Pair(id=key, before=rows[0][key], after=rows[last][key])
        for key in rows[0]
        if not rows[0][key]["correct"] and rows[last][key]["correct"]
    ]


def draw_curve(run: Path) -> Path:
    """Accuracy and reverse KL by step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, evals = read_lines(run / "metrics.jsonl"), read_lines(run / "eval.jsonl")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(
        [r["step"] for r in steps], [r["accuracy"] for r in steps], color="#999999", lw=1, label="rollouts"
    )
    for split, colour in zip(dict.fromkeys(r["split"] for r in evals), ("#0072B2", "#D55E00"), strict=False):
        mine = [r for r in evals if r["split"] == split]
        values = [r["avg_at_k"] for r in mine]
        bars = [
            [v - r["ci95"][0] for v, r in zip(values, mine, strict=True)],
            [r["ci95"][1] - v for v, r in zip(values, mine, strict=True)],
        ]
        left.errorbar(
            [r["step"] for r in mine],
            values,
            yerr=bars,
            fmt="o-",
            capsize=3,
            color=colour,
            label=f"{split}, unseen",
        )
    left.set(xlabel="optimiser step", ylabel="accuracy (avg@4)", ylim=(0, 1), title="Accuracy, 95% intervals")
    left.legend(frameon=False, fontsize=8)
    right.plot([r["step"] for r in steps], [r["reverse_kl_nats"] for r in steps], color="#0072B2")
    right.set(xlabel="optimiser step", ylabel="nats per token", title="Reverse KL, student's own rollouts")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    path = run / "curve.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
