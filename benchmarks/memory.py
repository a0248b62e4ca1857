"""What a step takes against what `onpath doctor` calculates (commands/doctor/fits.py), on a CPU.

    python benchmarks/memory.py [--threads 2]

A student and a teacher of 54.5M random weights, 4 rollouts of 128 tokens and 8 of 256 in one micro-batch,
two steps (AdamW's moments are there in the second). Each setting has a process of its own, or two that share
one model: the kernel's high-water mark of its resident memory, less what it held before the models, while it
loads and checks them and, from there on, of the steps; of two processes the larger.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import PeakMemory, environment, environment_line, write

from onpath.system import launcher

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "all weights": {},
    "all weights, recomputed": {"student": {"gradient_checkpointing": True}},
    "LoRA 64": {"student": {"lora_rank": 64}},
    "TOPD": {"method": {"name": "topd", "window": 16, "ratio_every": 0}},
    "two processes, layer": {"parallel": {"shard": "layer"}},
    "two processes, step": {"parallel": {"shard": "step"}},
    "two processes, layer, LoRA 64": {"parallel": {"shard": "layer"}, "student": {"lora_rank": 64}},
}
SHAPES = ((4, 32, 96), (8, 64, 192))
"""Rollouts of a process, tokens of a prompt and of a response."""


def made(directory: Path, name: str, shape: tuple[int, int, int], *, world: int = 1) -> Any:
    """The parts of one setting's run, of so many processes."""
    from on_gpu import long

    rollouts, prompt, response = shape
    size = long.Size(
        student="60m", teacher="60m-teacher", rollouts=rollouts * world, prompt=prompt, response=response,
        sampled=4, micro_batch_tokens=rollouts * (prompt + response), window=16, tiny=False,
    )  # fmt: skip
    base = {"student": {"gradient_checkpointing": False, "device": "cpu"}, "teacher": {"dtype": "float32"},
            "optim": {"bf16": False}, "rollout": {"batch_tokens": rollouts * (prompt + 4)}}  # fmt: skip
    given = SETTINGS[name]
    options = {k: {**base.get(k, {}), **given.get(k, {})} for k in {*base, *given} - {"method"}}
    if "parallel" in given:
        options["teacher"]["device"] = "auto"
    return long.make(directory, size, given.get("method", {"name": "opd"}), **options)


def planned(parts: Any, shape: tuple[int, int, int], *, world: int = 1) -> dict[str, float]:
    """Calculated bytes of a step of one process."""
    from onpath.commands.doctor.fits import parts_of, step_of

    rollouts, _, response = shape
    step = step_of(parts, response_tokens=rollouts * response)
    return parts_of(step, shard=parts.config.parallel.shard, world=world)


def measured(name: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """One setting, in this process, or in this one of two: bytes measured at the start and in steps, and
    calculated ones of a step."""
    from onpath.run.optimizer import make_optimizer
    from onpath.system import distributed
    from onpath.training import one_step

    world = int(os.environ.get("WORLD_SIZE", "1"))
    peak = PeakMemory()
    with TemporaryDirectory() as directory:
        before = peak.now()
        with peak("start"):
            parts = made(Path(directory), name, shape, world=world)
        with peak("steps"):
            optimizer, schedule = make_optimizer(parts.config, parts.models.student)
            schedule(0)
            for step in range(2):
                one_step(parts, optimizer, step)
        distributed.barrier()
    start, steps = ((peak.mib[phase] - before) * 2**20 for phase in ("start", "steps"))
    return {"start": start, "measured": steps, **planned(parts, shape, world=distributed.world())}


def in_processes(command: Sequence[str], world: int) -> list[dict[str, Any]]:
    """What each of so many processes prints last, which find each other as torchrun's do."""
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **rank})
        for rank in launcher.environments(world)
    ]
    try:
        said = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), command
    return [json.loads(text.splitlines()[-1]) for text in said]


def markdown(data: dict[str, Any]) -> str:
    """The page that is committed."""
    lines = [
        "# Memory: measured and calculated",
        "",
        f"`python benchmarks/memory.py`: {environment_line(data['environment'])}.",
        "A student and a teacher of 54.5M weights, float32, all rollouts of a process in one micro-batch.",
        "",
        "Measured: the peak of two steps, and before them that of loading and checking both models.",
        "",
        "| setting | rollouts of tokens | before, MiB | steps, MiB | calculated, MiB | calculated ÷ steps |",
        "|---|---|---|---|---|---|",
    ]
    for found in data["settings"]:
        first, steps, planned = (found[key] / 2**20 for key in ("start", "measured", "peak"))
        rollouts, prompt, response = found["shape"]
        lines.append(
            f"| {found['setting']} | {rollouts} of {prompt} + {response} | {first:,.0f} | {steps:,.0f} "
            f"| {planned:,.0f} | {planned / steps:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--setting", choices=list(SETTINGS), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.setting:
        print(json.dumps(measured(options.setting, tuple(options.shape))))
        return
    settings = []
    for shape, name in itertools.product(SHAPES, SETTINGS):
        command = [sys.executable, __file__, "--setting", name, "--threads", str(options.threads), "--shape"]
        found = in_processes([*command, *map(str, shape)], 1 + ("two" in name))
        largest = max(found, key=lambda process: process["measured"])
        print(name, shape, {k: round(v / 2**20) for k, v in largest.items()}, flush=True)
        settings.append({"setting": name, "shape": shape, **largest})
    data = {"environment": environment(), "settings": settings}
    write("memory", data, markdown(data))


if __name__ == "__main__":
    main()
