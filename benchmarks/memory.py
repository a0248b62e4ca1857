"""What a step takes against what `onpath doctor` calculates (commands/doctor/fits.py), on a CPU.

    python benchmarks/memory.py [--threads 2]

A student and a teacher of 54.5M random weights, 4 rollouts of 128 tokens in one micro-batch, two steps
(AdamW's moments are there in the second). Each setting has a process of its own: the kernel's high-water mark
of its resident memory, less what it held before the models.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import PeakMemory, environment, environment_line, write

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "all weights": {},
    "all weights, recomputed": {"student": {"gradient_checkpointing": True}},
    "LoRA 64": {"student": {"lora_rank": 64}},
    "TOPD": {"method": {"name": "topd", "window": 16, "ratio_every": 0}},
}
ROLLOUTS, PROMPT, RESPONSE = 4, 32, 96


def measured(name: str) -> dict[str, Any]:
    """One setting, in this process: measured and calculated bytes."""
    from on_gpu import long

    from onpath.commands.doctor.fits import parts_of, step_of
    from onpath.run.optimizer import make_optimizer
    from onpath.training import one_step

    size = long.Size(
        student="60m", teacher="60m-teacher", rollouts=ROLLOUTS, prompt=PROMPT, response=RESPONSE, sampled=4,
        micro_batch_tokens=ROLLOUTS * (PROMPT + RESPONSE), window=16, tiny=False,
    )  # fmt: skip
    base = {"student": {"gradient_checkpointing": False, "device": "cpu"}, "teacher": {"dtype": "float32"},
            "optim": {"bf16": False}, "rollout": {"batch_tokens": ROLLOUTS * (PROMPT + 4)}}  # fmt: skip
    given = SETTINGS[name]
    options = {k: {**base.get(k, {}), **given.get(k, {})} for k in {*base, *given} - {"method"}}
    peak = PeakMemory()
    with TemporaryDirectory() as directory:
        before = peak.now()
        with peak("step"):
            parts = long.make(Path(directory), size, given.get("method", {"name": "opd"}), **options)
            optimizer, schedule = make_optimizer(parts.config, parts.models.student)
            schedule(0)
            for step in range(2):
                one_step(parts, optimizer, step)
    planned = parts_of(step_of(parts, response_tokens=ROLLOUTS * RESPONSE))
    return {"measured": (peak.mib["step"] - before) * 2**20, **planned}


def markdown(data: dict[str, Any]) -> str:
    """The page that is committed."""
    lines = [
        "# Memory: measured and calculated",
        "",
        f"`python benchmarks/memory.py`: {environment_line(data['environment'])}.",
        "A student and a teacher of 54.5M weights, float32, "
        f"{ROLLOUTS} rollouts of {PROMPT} + {RESPONSE} tokens in one micro-batch.",
        "",
        "| setting | measured, MiB | calculated, MiB | calculated ÷ measured |",
        "|---|---|---|---|",
    ]
    for name, found in data["settings"].items():
        a, b = found["measured"] / 2**20, found["peak"] / 2**20
        lines.append(f"| {name} | {a:,.0f} | {b:,.0f} | {b / a:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--setting", choices=list(SETTINGS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.setting:
        print(json.dumps(measured(options.setting)))
        return
    settings = {}
    for name in SETTINGS:
        command = [sys.executable, __file__, "--setting", name, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        settings[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, {k: round(v / 2**20) for k, v in settings[name].items()}, flush=True)
    data = {"environment": environment(), "settings": settings}
    write("memory", data, markdown(data))


if __name__ == "__main__":
    main()
