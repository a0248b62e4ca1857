"""What a run costs: one real step, timed and measured, against the memory, disk and hours there are."""

import math
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from onpath.commands.doctor.finding import Finding
from onpath.commands.doctor.fits import (
    SHARDS,
    WHOLE,
    Shard,
    Step,
    beside_vllm,
    cures,
    fewest_processes,
    parts_of,
    spread,
    step_of,
    step_of_config,
    together,
)
from onpath.commands.doctor.sample import Probe, as_they_are
from onpath.commands.doctor.scores import student_logps
from onpath.config.whole import Config
from onpath.engines.adapters import is_adapter
from onpath.engines.models import locate, pick_device
from onpath.engines.sharding import asked, layout, local
from onpath.run.meter import STAGES
from onpath.run.optimizer import make_optimizer
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.training import one_step

_STEP_SECONDS = 30.0
"""Longest step that is run in full; of a longer one a share is run, and scaled."""
_STEP_OF_PROBE = 3.0
"""A whole step's time over that of sampling and correcting, roughly: enough to choose the share."""
_FULL = 0.9
"""Share of the memory from which the check warns."""
_MOST_OF_IT, _NOT_WORTH = 0.5, 1.0
"""Share of a step of which a stage is worth a word, and seconds of a step below which none is."""
_FAR = 0.1
"""Nats a token that one step moves the student, from which the check warns. At rates that train well it is
0.04 and less, on the gym and on SmolLM2 with and without LoRA; at ten times that rate 0.1 to 2."""
_ROLLOUTS = 16
"""On which that is measured."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one optimiser step of the config."""

    seconds: dict[str, float]
    """By stage."""
    generated_tokens: int
    scale: float
    """1: the whole step was run; above 1: fewer prompts, and seconds multiplied by this."""
    peak_bytes: int
    """Of the process that takes most."""
    room_bytes: int
    """Memory of the device, or what the process may take of the host's."""
    moved_nats: float
    """KL(student before ‖ after the step at the full rate), a mean over tokens of its own rollouts."""


def measure(parts: Parts, probe: Probe) -> Cost:
    """Runs one optimiser step for real, of all processes, AdamW's state included. Call it within
    `probe.untouched`."""
    config = parts.config
    prompts = config.rollout.prompts
    longer = config.rollout.max_new_tokens / max(1, max(len(r.ids) for r in probe.rollouts))
    each = probe.seconds / len(probe.rollouts) * (longer if probe.shortened else 1.0)
    expected = _STEP_OF_PROBE * each * prompts * config.rollout.n
    most = int(prompts * _STEP_SECONDS / max(expected, 1e-9))
    fewer = distributed.first_decides(lambda: max(1, min(prompts, most)))  # each has seconds of its own
    rollout = config.rollout.model_copy(update={"prompts": fewer})
    parts = replace(parts, config=config.model_copy(update={"rollout": rollout}))
    optimizer, _ = make_optimizer(parts.config, parts.models.student)  # at the full rate, without a warm-up
    before = _logps(parts, probe)
    on_gpu = parts.models.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(parts.models.device)
    trained = [local(p) for p in parts.models.student.parameters() if p.requires_grad]
    saved = sum(p.numel() * p.element_size() for p in trained)
    meter = one_step(parts, optimizer, 0)
    peak = torch.cuda.max_memory_allocated(parts.models.device) if on_gpu else _peak_of_process() - saved
    scale = prompts / fewer
    return Cost(
        seconds={stage: meter.watch.seconds.get(stage, 0.0) * scale for stage in (*STAGES, "grade")},
        generated_tokens=round(distributed.total([sum(len(r.ids) for r in meter.rollouts)])[0] * scale),
        scale=scale,
        peak_bytes=distributed.most(peak),
        room_bytes=_room(parts.models.device),
        moved_nats=_apart(before, _logps(parts, probe)),
    )


def _logps(parts: Parts, probe: Probe) -> list[float]:
    rows = student_logps(parts, as_they_are(probe.rollouts[:_ROLLOUTS]))
    return [value for row in rows for value in row]


def _apart(before: Sequence[float], after: Sequence[float]) -> float:
    """KL(before ‖ after) a token, by log-probs of tokens drawn from `before`: the mean of r − 1 − log r with
    r = p_after / p_before. Never below 0; r − 1, whose mean is 0, takes noise out of the log-ratio."""
    logs = [min(now - then, 50.0) for then, now in zip(before, after, strict=True)]
    return sum(math.expm1(log) - log for log in logs) / max(1, len(logs))


def rate(parts: Parts, cost: Cost) -> Finding:
    """How far does one step move the student?"""
    lr, moved = parts.config.optim.lr, cost.moved_nats
    message = f"one step at the full rate, {lr:g}, moves the student by {moved:.2g} nats a token"
    values = {"lr": lr, "moved_nats": moved}
    if moved < _FAR:
        return Finding(name="rate", status="ok", message=message, values=values)
    advice = "lower optim.lr: at rates that train well a step moves it by 0.04 nats or less"
    return Finding(name="rate", status="warning", message=message, advice=advice, values=values)


def speed(parts: Parts, cost: Cost) -> Finding:
    """Seconds a step, hours a run, evaluations included."""
    config, step = parts.config, sum(cost.seconds.values())
    generate = cost.seconds["sample"] / max(1, cost.generated_tokens)
    each = cost.generated_tokens / (config.rollout.prompts * config.rollout.n)
    every = config.eval.every
    times = (
        int(config.eval.start) + (config.optim.steps - 1) // every + 1
        if every
        else 1 + int(config.eval.start)
    )
    problems = sum(len(prompts) for prompts in parts.prompts.evals.values())
    evaluating = times * problems * config.eval.n * each * generate
    hours = (config.optim.steps * step + evaluating) / 3600
    values = {
        "seconds_per_step": step,
        "hours": hours,
        "seconds_evaluating": evaluating,
        "generated_tokens_per_second": 1 / generate if generate else None,
        "scaled_by": cost.scale,
        **{f"seconds_{stage}": seconds for stage, seconds in cost.seconds.items()},
    }
    shares = ", ".join(
        f"{stage} {cost.seconds[stage] / step:.0%}" for stage in ("sample", "correct", "score", "train")
    )
    message = (
        f"{step:.2g} s a step ({shares}); {config.optim.steps} steps and evaluations: {_duration(hours)}"
    )
    message += "" if cost.scale == 1 else f" (scaled up {cost.scale:.1f} times from fewer prompts)"
    return Finding(name="speed", status="ok", message=message, advice=_faster(config, cost), values=values)


def _faster(config: Config, cost: Cost) -> str:
    """What to change first: of the stage that takes most of the step, if it takes more than half."""
    step = sum(cost.seconds.values())
    stage = max(cost.seconds, key=lambda name: cost.seconds[name])
    if cost.seconds[stage] <= _MOST_OF_IT * step or step < _NOT_WORTH:
        return ""
    scored = "" if config.optim.bf16 else "optim.bf16: true, "
    longest = (
        "a shorter method.rewrite_max_new_tokens" if config.method.learns_from_text else "fewer candidates"
    )
    ways = {
        "sample": "rollout.engine: vllm" if config.rollout.engine == "hf" else "rollout.overlap: true",
        "correct": f"a teacher on a server (teacher.engine: vllm), {longest}",
        "score": f"{scored}teacher.dtype: bfloat16",
        "train": f"{scored}student.gradient_checkpointing: false where memory is left",
        "grade": "a cheaper eval.grader",
    }
    if config.method.writes_rollouts:  # the teacher does, or both models in this process
        ways["sample"] = "" if config.method.trains_on_rollouts else ways["correct"]
    return f"{stage} takes most of it; what shortens it: {ways[stage]}" if ways.get(stage) else ""


def memory(parts: Parts, cost: Cost) -> Finding:
    """Peak of a real step against what is there."""
    peak, room = cost.peak_bytes / 2**30, cost.room_bytes / 2**30
    where = "GPU" if parts.models.device.type == "cuda" else "host"
    values = {"peak_gib": peak, "room_gib": room, "device": parts.models.device.type}
    each = " in each process" if distributed.world() > 1 else ""
    message = f"a step takes {peak:.2g} of {room:.3g} GiB of {where} memory{each}"
    message += "" if cost.scale == 1 else f" (measured on 1/{cost.scale:.1f} of a step: at least that)"
    if peak <= _FULL * room:
        return Finding(name="memory", status="ok", message=message, values=values)
    advice = "lower optim.micro_batch_tokens and rollout.batch_tokens, or set student.gradient_checkpointing"
    status = "fail" if peak > room else "warning"
    return Finding(name="memory", status=status, message=message, advice=advice, values=values)  # type: ignore[arg-type]


def fits(parts: Parts, cost: Cost) -> Finding:
    """What is calculated for this config, as whole copies and as shards, against the room of one device."""
    step = step_of(parts, response_tokens=cost.generated_tokens // distributed.world())
    here = (parts.config.parallel.shard, layout(parts.config)[1]) if asked(parts.config) else WHOLE
    return _fits(beside_vllm(step, parts.config.rollout, cost.room_bytes), cost.room_bytes, here)


def fits_unloaded(config: Config) -> Finding:
    """Likewise where the models do not fit, so that they cannot be asked."""
    device = pick_device(config.student.device, "student.device")
    step, room = spread(step_of_config(config, device=device), distributed.world()), _room(device)
    return _fits(beside_vllm(step, config.rollout, room), room)


def _fits(step: Step, room: int, here: tuple[Shard, int] = WHOLE) -> Finding:
    """See `fits`.

    Args:
        here: how models are sharded now, over how many processes.
    """
    ways = dict.fromkeys((WHOLE, *((s, n) for s in SHARDS[1:] for n in (2, 8)), here))
    alone = together(step, distributed.world())
    steps = {way: step if way in (WHOLE, here) else spread(alone, way[1]) for way in ways}
    planned = {way: parts_of(steps[way], shard=way[0], world=way[1])["peak"] / 2**30 for way in ways}
    whole = parts_of(step)
    names = (
        *("weights", "gradients", "moments", "teacher", "copies", "activations", "loss", "kept", "vllm"),
        *("saving", "ahead"),
    )
    largest = max(names, key=lambda name: whole[name])
    values = {
        **{f"{shard}_{world}_gib": gib for (shard, world), gib in planned.items()},
        **{f"{name}_gib": whole[name] / 2**30 for name in names},
        "room_gib": room / 2**30,
        "processes_by_layer": fewest_processes(alone, _FULL * room, shard="layer"),
    }
    message = (
        f"calculated: {whole['peak'] / 2**30:.2g} GiB as whole copies (most of it {largest}, "
        f"{whole[largest] / whole['peak']:.0%}), {planned['step', 8]:.2g} sharded by step over 8 processes, "
        f"{planned['layer', 8]:.2g} by layer; {room / 2**30:.3g} are there"
    )
    if here != WHOLE:
        message = f"{planned[here]:.2g} GiB a process as it is here, by {here[0]} over {here[1]}; {message}"
    if planned[here] * 2**30 <= _FULL * room:
        return Finding(name="fits", status="ok", message=message, values=values)
    found = cures(step, _FULL * room, processes=distributed.world())
    advice = f"what makes it fit: {'; or '.join(found)}" if found else "take smaller models"
    return Finding(name="fits", status="warning", message=message, advice=advice, values=values)


def disk(parts: Parts) -> Finding:
    """Checkpoints that are kept, one being written, and the final model, against the free space."""
    config = parts.config
    trained = sum(p.numel() * p.element_size() for p in parts.models.student.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for p in parts.models.student.parameters())
    # Beside an adapter: the merged model, and the base that no other directory holds.
    second = is_adapter(locate(config.student.model))
    copies = int(config.student.lora_merge) + int(second) if config.student.lora_rank else 0
    followed = [parts.models.teacher.state(), parts.overlap.state() if parts.overlap else {}]
    others = sum(t.numel() * t.element_size() for state in followed for t in state.values())
    need = ((3 * trained + others) * (config.run.keep + 1) + trained + copies * whole) / 2**30
    place = Path(config.run.dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    values = {"needed_gib": need, "free_gib": free}
    message = (
        f"checkpoints and model take up to {need:.2g} GiB; {free:.3g} GiB are free under {config.run.dir}"
    )
    if not os.access(place, os.W_OK):
        message, advice = f"{place} cannot be written to", "choose another run.dir"
        return Finding(name="disk", status="fail", message=message, advice=advice, values=values)
    if need < free:
        return Finding(name="disk", status="ok", message=message, values=values)
    advice = "lower run.keep, or choose another run.dir"
    return Finding(name="disk", status="fail", message=message, advice=advice, values=values)


def _duration(hours: float) -> str:
    return (
        f"{hours:.1f} h"
        if hours >= 1
        else f"{hours * 60:.0f} min"
        if hours * 60 >= 2
        else f"{hours * 3600:.0f} s"
    )


def _peak_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _room(device: torch.device) -> int:
    """Bytes of the device; for a CPU this process's part of what is free now, and what it holds already, or
    its part of the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    sharing = distributed.local_world()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sharing
    with suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        total = min(total, int(lines["MemAvailable"].split()[0]) * 1024 // sharing + held)
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()) // sharing)
    return total
