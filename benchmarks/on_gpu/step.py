"""One OPD step and one TOPD step, Qwen3-1.7B with a Qwen3-8B teacher, 64 rollouts of 2,048 tokens, by stage.

Shares of the hardware (MFU) count the models' own products: 2·P·tokens of a forward pass, attention
included, three times that in training (recomputation is work, but not counted), two products of a head
in scoring and four in the loss. The plan is what docs/hardware.md calculates with.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from on_gpu import long
from on_gpu.device import DEVICE, free, matrix_flops
from onpath import training
from onpath.commands.doctor.fits import parts_of, step_of
from onpath.run.optimizer import make_optimizer

TOPD = {"name": "topd", "ratio_every": 0}
_PLAN = {"score": 0.5 * 989e12, "train": 0.4 * 989e12}
"""FLOP/s that the plan assumes, the second with recomputation counted."""


def forward_flops(shape: dict[str, Any], rows: int, length: int) -> float:
    """Of the decoder without its head, causal attention counted by half."""
    width, heads, kv = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    size = shape["head_dim"]
    layer = width * size * (2 * heads + 2 * kv) + 3 * width * shape["intermediate_size"]
    products = 2 * layer * rows * length + 2 * 2 * heads * size * rows * length**2 / 2
    return float(shape["num_hidden_layers"] * products)


def run(record: Any, *, tiny: bool, left: Any) -> None:
    ceiling = matrix_flops(256 if tiny else 8192)
    size = long.published(tiny=tiny)
    with TemporaryDirectory() as directory, mock.patch.object(training, "Stopwatch", long.Watch):
        plain = long.make(Path(directory), size, {"name": "opd"})
        optimizer, schedule = make_optimizer(plain.config, plain.models.student)
        schedule(0)
        guided = long.with_method(plain, {**TOPD, "window": size.window})
        # Twice each: the first step also chooses and compiles kernels, and makes AdamW's moments.
        for turn, (name, parts) in enumerate([("opd", plain), ("topd", guided)] * 2):
            if turn > 1 and left() < 45 and not tiny:
                return
            meter = training.one_step(parts, optimizer, turn)
            _say(record, f"{name}, {'first' if turn < 2 else 'second'} step", meter, parts, size, ceiling)
            free()


def _say(record: Any, name: str, meter: Any, parts: Any, size: long.Size, ceiling: float) -> None:
    tokens = sum(len(r.ids) for r in meter.rollouts)
    length = size.prompt + size.response
    shapes = [m.config.to_dict() for m in (parts.models.student, parts.models.teacher.model)]
    student, teacher = (forward_flops(s, len(meter.rollouts), length) for s in shapes)
    heads = [2 * s["vocab_size"] * s["hidden_size"] * tokens for s in shapes]
    work = {"score": teacher, "train": 3 * student + 3 * heads[0] + heads[1]}
    plan = {
        "score": work["score"] / _PLAN["score"],
        "train": (4 * student + 3 * heads[0] + heads[1]) / _PLAN["train"],
    }
    for stage, spent in meter.watch.seconds.items():
        cells: dict[str, Any] = {"step": name, "stage": stage, "s": spent}
        if stage in work and spent > 1e-3 and name.startswith("opd"):
            cells |= {
                "TFLOP/s": work[stage] / spent / 1e12,
                "share of the measured product": work[stage] / spent / ceiling,
                "plan, s": plan[stage],
            }
        record("Seconds and peak memory by stage", **cells, **{"peak GiB": meter.watch.peaks.get(stage)})
    whole = sum(meter.watch.seconds.values())
    record(
        "Whole steps",
        step=name,
        s=whole,
        rollouts=len(meter.rollouts),
        **{"response tokens": tokens, "peak GiB": max(meter.watch.peaks.values()), "device": DEVICE.type},
        **{"calculated peak GiB": parts_of(step_of(parts, response_tokens=tokens))["peak"] / 2**30},
        **{f"topd {k}, s": v for k, v in meter.step.prepared.metrics.get("topd_seconds", {}).items()},
        windows=meter.step.prepared.totals.get("fork_candidates"),
        loss=meter.sums["loss"],
        grad_norm=meter.grad_norm,
    )
