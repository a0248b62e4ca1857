"""`onpath eval`: one model, or two on the same problems."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from onpath.commands.terminal import console_for
from onpath.config import Student
from onpath.data.load import load_prompts
from onpath.data.render import Renderer
from onpath.engines.hf import HFEngine
from onpath.engines.models import load_model, load_tokenizer, pick_device, stop_ids
from onpath.evaluate.scores import EvalResult, compare, evaluate
from onpath.grade.base import Grader
from onpath.grade.graders import grader_for
from onpath.records import Graded, Prompt, Rollout, Sampling
from onpath.run.trajectories import sample_row, write_parquet
from onpath.system.errors import UserError
from onpath.system.files import make_directory, write_text


def run_eval(options: argparse.Namespace) -> int:
    """Evaluates, prints a table or JSON, and writes the files asked for."""
    n = options.n if options.n is not None else options.k
    if options.k < 1:
        raise UserError(f"--k is {options.k}; pass@k needs 1 or more")
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature is {options.temperature}; use 0 (greedy) or a number above it")
    if options.k > n:
        raise UserError(f"--k is {options.k}, but there are {n} samples per problem; raise --n or lower --k")
    prompts = load_prompts(options.data, limit=options.limit, split_default="test").prompts
    grader = grader_for(options.grader, [options.data])
    if options.out:
        make_directory(Path(options.out))
    models = [options.model, *([options.against] if options.against else [])]
    done = [(name, *evaluate_model(name, prompts, grader, options, n)) for name in models]
    report: dict[str, Any] = {"models": {name: result.to_json() for name, result, _, _ in done}}
    if options.against:
        difference = compare(done[0][1], done[1][1])
        report["paired_difference"] = {
            "avg_at_k": difference.difference,
            "ci95": list(difference.ci95),
            "p_value": difference.p_value,
        }
    if options.out:
        _write(Path(options.out), report, done)
    print(json.dumps(report)) if options.json else _print(report)
    return 0


def evaluate_model(
    name: str, prompts: Sequence[Prompt], grader: Grader, options: argparse.Namespace, n: int
) -> tuple[EvalResult, list[Graded], Renderer]:
    """One model's result, its graded samples, and the renderer that reads them."""
    section = Student(model=name, dtype=options.dtype, device=options.device)
    tokenizer = load_tokenizer(section, "MODEL")
    model = load_model(section, "MODEL", pick_device(options.device, "--device"))
    renderer = Renderer(tokenizer)
    engine = HFEngine(
        model, renderer, stop_ids=stop_ids(model, tokenizer, "MODEL"), batch_tokens=options.batch_tokens
    )
    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )

    def generate(asked: Sequence[Prompt], count: int) -> list[Rollout]:
        return engine.generate(asked, sampling, n=count)

    split = options.data.removeprefix("gym:") if options.data.startswith("gym:") else Path(options.data).stem
    result, graded = evaluate(prompts, generate, renderer.text, grader, n=n, k=options.k, step=0, split=split)
    return result, graded, renderer


def _write(
    directory: Path, report: dict[str, Any], done: Sequence[tuple[str, EvalResult, list[Graded], Renderer]]
) -> None:
    path = directory / "eval.json"
    path.unlink(missing_ok=True)  # it comes last: where it is, the samples are
    for index, (_, _, graded, renderer) in enumerate(done):
        write_parquet(directory / f"samples_{index}.parquet", [sample_row(g, renderer) for g in graded])
    write_text(path, json.dumps(report, indent=1) + "\n")


def _print(report: dict[str, Any]) -> None:
    console = console_for(sys.stdout)
    table = Table(box=None, pad_edge=False)
    for column in (
        "model",
        "split",
        "problems",
        "avg@n",
        "95% interval",
        "pass@k",
        "95% interval",
        "length",
        "ended",
    ):
        table.add_column(column, justify="left" if column in ("model", "split") else "right", no_wrap=True)
    for name, row in report["models"].items():
        low, high = row["ci95"]
        below, above = row["pass_at_k_ci95"]
        table.add_row(
            name,
            row["split"],
            f"{row['problems']:,}",
            f"@{row['n']} {row['avg_at_k']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"@{row['k']} {row['pass_at_k']:.1%}",
            f"{below:.1%} to {above:.1%}",
            f"{row['mean_length']:.1f}",
            f"{row['finished']:.1%}",
        )
    console.print(table)
    if difference := report.get("paired_difference"):
        low, high = difference["ci95"]
        console.print(
            f"first − second on the same problems: {difference['avg_at_k']:+.1%} [{low:+.1%}, {high:+.1%}], "
            f"p = {difference['p_value']:.2g}",
            highlight=False,
        )
