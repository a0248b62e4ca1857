"""One optimiser step of plain OPD beside TRL's, by benchmarks/opd_step.py: the gym's models, and two models
of SmolLM2-135M's shape. float32 and transformers' generation on both sides."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import opd_step
import torch
from common import Spread

from on_gpu.device import DEVICE, free
from on_gpu.shapes import build, write_model, write_prompts


def run(record: Any, *, tiny: bool, left: Any) -> None:
    device = DEVICE.type
    small = opd_step.Shape(prompts=4, new_tokens=8, device=device, warm_up=1)
    whole = opd_step.Shape(device=device)
    larger = opd_step.Shape(prompts=32, new_tokens=128, device=device)
    for name, prepare, shape in (
        ("gym", opd_step.prepare, small if tiny else whole),
        ("SmolLM2-135M", lambda directory: _smollm2(directory, tiny), small if tiny else larger),
    ):
        if left() < 20 and not tiny:
            return
        with TemporaryDirectory() as directory:
            prepare(Path(directory))
            found = opd_step.measure_time(Path(directory), 2 if tiny else 5, shape)
        steps = found["steps"]
        ratios = [s["onpath"]["step"] / s["trl"]["step"] for s in steps]
        for phase in (*opd_step.PHASES, "step"):
            ours, theirs = ([s[side][phase] for s in steps] for side in ("onpath", "trl"))
            record(
                "A step of OPD beside TRL's, seconds: median [quartiles]",
                models=name,
                phase=phase,
                **{"onpath": str(Spread.of(ours)), "TRL": str(Spread.of(theirs))},
                ratio=str(Spread.of([a / b for a, b in zip(ours, theirs, strict=True) if b])),
            )
        record(
            "Agreement on one batch, and the ratio of paired steps",
            models=name,
            **found["agreement"],
            ratio=str(Spread.of(ratios)),
            n=len(ratios),
        )
        free()


def _smollm2(directory: Path, tiny: bool) -> None:
    """Two models of one shape, other weights; nobody grades."""
    for role in ("student", "teacher"):
        write_model(directory / role, "smollm2-135m", tiny=tiny)
        build(directory / role, torch.float32).save_pretrained(directory / role)
    write_prompts(directory / "prompts.jsonl", 64, 6 if tiny else 100, 256)
