"""One optimiser step of TOPD against one of OPD: the same student, teacher, prompts, rollouts and optimiser.

    python benchmarks/topd_step.py [--pairs 100] [--window 24 14] [--threads 1]

One process, one length of windows after the other, pairs in order A B, B A; both sides of a pair sample the
same rollouts (one seed, and a learning rate so small that the weights hardly move). TOPD's extra work is
split by its own clock: reading with both models (which the loss then does not repeat), windows, transport,
targets.
"""

import argparse
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import Spread, environment, environment_line, gym_settings, write

STAGES = ("sample", "correct", "score", "train")
PARTS = ("read", "windows", "transport", "targets")
WARM_UP = 3


def settings(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Plain OPD on the gym, nobody grading."""
    from onpath import gym

    rows = [{"id": r["id"], "prompt": r["prompt"]} for r in gym.rows("train", options.prompts)]
    data = directory / "prompts.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return gym_settings(
        directory,
        train=str(data),
        prompts=options.prompts,
        micro_batch_tokens=options.micro_batch_tokens,
    )


def measure(directory: Path, options: argparse.Namespace, window: int) -> list[dict[str, Any]]:
    """Seconds of both sides of each pair."""
    from onpath import config
    from onpath.methods import make_method
    from onpath.run.assemble import assemble
    from onpath.run.optimizer import make_optimizer
    from onpath.training import one_step

    base = settings(directory, options)
    plain = assemble(config.build(base))
    method = {"name": "topd", "window": window, "decide": "quantile", "reuse_cache": not options.no_cache}
    changed = config.build({**base, "method": method})
    guided = replace(plain, config=changed, method=make_method(changed.method, plain.tools))
    optimizer, _ = make_optimizer(plain.config, plain.models.student)
    rows: list[dict[str, Any]] = []
    for pair in range(WARM_UP + options.pairs):
        row: dict[str, Any] = {}
        for name, parts in [("opd", plain), ("topd", guided)][:: 1 if pair % 2 else -1]:
            begun = time.perf_counter()
            meter = one_step(parts, optimizer, pair)
            row[name] = {"step": time.perf_counter() - begun, **meter.watch.seconds}
            if name == "topd":
                row["topd"] |= meter.step.prepared.metrics["topd_seconds"]
                row["counts"] = {
                    "tokens": sum(len(r.ids) for r in meter.rollouts),
                    **{
                        k: meter.step.prepared.totals[k]
                        for k in ("fork_candidates", "forks", "teacher_tokens_generated")
                    },
                }
        rows.append(row)
    return rows[WARM_UP:]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles of seconds, and of paired ratios."""
    plain = [r["opd"]["step"] for r in rows]
    seconds = {
        side: {k: vars(Spread.of([r[side][k] for r in rows])) for k in ("step", *STAGES)}
        for side in ("opd", "topd")
    }
    return {
        "seconds": seconds,
        "parts": {k: vars(Spread.of([r["topd"][k] for r in rows])) for k in PARTS},
        "share_of_opd_step": {
            k: Spread.of([r["topd"][k] / p for r, p in zip(rows, plain, strict=True)]).median for k in PARTS
        },
        "ratio": ratio_of(ratios(rows)),
        "counts": {k: Spread.of([r["counts"][k] for r in rows]).median for k in rows[0]["counts"]},
    }  # fmt: skip


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """TOPD's step over OPD's, pair by pair."""
    return [r["topd"]["step"] / r["opd"]["step"] for r in rows]


def ratio_of(values: Sequence[float]) -> dict[str, Any]:
    """With a 95% interval of the median, from the order statistics (binomial, normal approximation)."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * math.sqrt(n)
    ends = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return {**vars(Spread.of(values)), "median_ci95": [ordered[i] for i in ends]}


def markdown(data: Mapping[str, Any]) -> str:
    """The page that is committed."""
    s = data["settings"]
    lines = [
        "# One step of TOPD against one of OPD",
        "",
        f"`python benchmarks/topd_step.py {s['command']}`: {environment_line(data['environment'])}. "
        f"The gym's bundled models, {s['prompts']} prompts, at most {s['micro_batch_tokens']} tokens per "
        "micro-batch.",
    ]
    for window, found in data["windows"].items():
        lines += ["", *section(window, found["summary"])]
    lines += [
        "",
        "`read` is the student's and the teacher's forward pass, which score and train then leave out.",
    ]
    return "\n".join(lines)


def section(window: str, found: Mapping[str, Any]) -> list[str]:
    """One length of windows."""

    def cell(value: Mapping[str, float]) -> str:
        return f"{1000 * value['median']:.0f} [{1000 * value['low']:.0f}, {1000 * value['high']:.0f}]"

    counts, r = found["counts"], found["ratio"]
    lines = [
        f"## K = {window}",
        "",
        f"Ratio of paired steps: median **{r['median']:.3f}** (95% interval "
        f"{r['median_ci95'][0]:.3f}-{r['median_ci95'][1]:.3f}; quartiles {r['low']:.3f}, {r['high']:.3f}), "
        f"n = {r['n']}. Per step {counts['tokens']:.0f} response tokens, "
        f"{counts['fork_candidates']:.0f} candidates, {counts['forks']:.0f} forks, "
        f"{counts['teacher_tokens_generated']:.0f} window tokens.",
        "",
        "| ms, median [quartiles] | OPD | TOPD |",
        "|---|---|---|",
    ]
    for key in (*STAGES, "step"):
        lines.append(
            f"| {key} | {cell(found['seconds']['opd'][key])} | {cell(found['seconds']['topd'][key])} |"
        )
    lines += [
        "",
        "| TOPD's `correct` | ms | share of OPD's step |",
        "|---|---|---|",
    ]
    for key in PARTS:
        lines.append(f"| {key} | {cell(found['parts'][key])} | {found['share_of_opd_step'][key]:.1%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--window", type=int, nargs="+", default=[24, 14])
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument(
        "--no-cache", action="store_true", help="windows read each prefix anew; writes no results"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    windows: dict[str, Any] = {}
    for window in options.window:
        with tempfile.TemporaryDirectory() as name:
            rows = measure(Path(name), options, window)
        windows[str(window)] = {
            "summary": summary(rows),
            "ratios": [round(ratio, 4) for ratio in ratios(rows)],
        }
    shown = ("pairs", "threads", "prompts", "micro_batch_tokens")
    command = " ".join(f"--{k.replace('_', '-')} {getattr(options, k)}" for k in shown)
    command += " --window " + " ".join(windows)
    data = {
        "environment": environment(),
        "settings": {**{k: getattr(options, k) for k in shown}, "command": command},
        "windows": windows,
    }
    if options.no_cache:
        print(markdown(data))
    else:
        write("topd_step", data, markdown(data))


if __name__ == "__main__":
    main()
