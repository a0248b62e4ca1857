"""The story: on-policy distillation of trajectories, one step after another.

    sample    the student writes                        engine.generate     → rollouts
    correct   the method edits or annotates them        method.prepare      → trajectories
    score     the teacher reads them                    teacher.hidden      → hidden states
    train     divergence × weights ÷ global count       fused_objective     → gradients, clip, AdamW
    sync      the new weights to the engine             engine.sync_weights → policy version + 1

Every random draw is a pure function of (seed, step), so a run that is killed and started again goes on
exactly.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onpath import config as configuration
from onpath.config.build import Config
from onpath.data.batch import collate, micro_batches
from onpath.data.load import prompts_of_step
from onpath.engines.overlap import fresh
from onpath.methods.trd.gate import gate
from onpath.records import Graded, Rollout, token_count
from onpath.run.assemble import assemble
from onpath.run.directory import Run, open_run
from onpath.run.evaluation import evaluate_all, saved_evaluations
from onpath.run.log import Display
from onpath.run.loss import loss_of, teacher_states, top_k
from onpath.run.meter import Meter, Stopwatch
from onpath.run.optimizer import make_optimizer
from onpath.run.parts import Parts
from onpath.run.trajectories import store_step
from onpath.run.weights import shaped
from onpath.system import distributed
from onpath.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    directory: Path
    """The run's directory; its files are listed in the README."""
    model: Path
    """Final weights in Hugging Face format (a LoRA run: the adapter)."""
    steps: int
    evaluations: tuple[dict[str, Any], ...]
    """The final step's lines of eval.jsonl, one per evaluation set."""


def train(config: Config | str | Path, *, quiet: bool = False) -> RunResult:
    """Runs a config to its end, going on where an earlier process of the same config stopped.

    Args:
        config: see `onpath.config`; or the path of its YAML.
        quiet: no progress display; files are written all the same.

    Raises:
        UserError: something that the user can fix, in one sentence; nothing finished is lost.
    """
    config = config if isinstance(config, Config) else configuration.load(config)
    try:
        parts = assemble(config)
        with closing(open_run(config, parts)) as run:
            if not run.finished:
                optimise(parts, run, quiet=quiet)
                run.save_model()
            return RunResult(
                directory=run.directory,
                model=run.directory / "model",
                steps=config.optim.steps,
                evaluations=tuple(saved_evaluations(run, config.optim.steps)),
            )
    finally:
        distributed.stop()


def optimise(parts: Parts, run: Run, *, quiet: bool) -> None:
    """All optimiser steps that are left, with the evaluations and checkpoints that fall due."""
    config = parts.config
    optimizer, schedule = make_optimizer(parts)
    parts.engine.sync_weights(0)
    gate(parts, run)
    write_ahead(parts)
    done = run.resume(optimizer)
    with Display(steps=config.optim.steps, done=done, quiet=quiet or distributed.rank() > 0) as display:
        run.announce(display, done)
        if done == 0 and config.eval.start:
            evaluate_all(parts, run, display, step=0)
        for step in range(done, config.optim.steps):
            schedule(step)
            meter = one_step(parts, optimizer, step)
            row = run.log(step + 1, meter, lr=optimizer.param_groups[0]["lr"])
            display.step(row)
            last = step + 1 == config.optim.steps
            if last or (config.eval.every and (step + 1) % config.eval.every == 0):
                evaluate_all(parts, run, display, step=step + 1)
            store_step(parts, run, meter, step + 1)
            if last or (config.run.save_every and (step + 1) % config.run.save_every == 0):
                run.checkpoint(step + 1, optimizer)


def one_step(parts: Parts, optimizer: torch.optim.Optimizer, step: int) -> Meter:
    """Sample, correct, score, train, sync: one optimiser step."""
    config, watch = parts.config, Stopwatch()
    with watch("sample"):
        rollouts = sample(parts, step)
    with watch("correct"):
        prepared = shaped(parts, parts.method.prepare(rollouts, step=step))
        kept = [t for t in prepared.trajectories if t.edit.kept]
        (denominator,) = distributed.total([token_count(kept)], parts.device)
    with watch("grade"):
        verdicts = graded(parts, rollouts)
    meter = Meter(watch=watch, rollouts=rollouts, prepared=prepared, denominator=denominator, graded=verdicts)
    parts.student.train()
    for micro in micro_batches(kept if denominator else [], max_tokens=config.optim.micro_batch_tokens):
        batch = collate(micro, device=parts.device)
        with watch("score"):
            teacher = teacher_states(parts, batch, prepared)
        with watch("train"):
            result = loss_of(parts, batch, teacher, prepared, denominator, top_k(config, step + 1))
            result.loss.backward()
        meter.add(batch, result)
    with watch("train"):
        distributed.sum_gradients(parts.student)
        meter.gradient_cosine = parts.cosine(step)
        trained = [p for p in parts.student.parameters() if p.requires_grad]
        meter.grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm))
        if not math.isfinite(meter.grad_norm):
            raise UserError(
                f"step {step + 1}: the gradient is not finite; go on from the last checkpoint with another "
                "run.name and a lower optim.lr, or float32 instead of bf16"
            )
        if denominator:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        parts.method.after_step(meter.measured(parts.device))
    if parts.ahead is not None:
        with watch("sample"):
            parts.ahead.before_sync()
    with watch("sync"):
        parts.engine.sync_weights(step + 1)
    return meter


def write_ahead(parts: Parts) -> None:
    """Offline methods: the starting weights write everything that the run will train on, before a checkpoint
    replaces them."""
    if parts.cache is not None:
        for step in range(parts.config.optim.steps):
            parts.method.prepare(sample(parts, step), step=step)
            parts.cache.share()  # a later epoch may deal this prompt to another process
        parts.cache.sealed = True


def sample(parts: Parts, step: int) -> list[Rollout]:
    """This process's rollouts of one step: the student's own samples (rollout.overlap: of one step ago)."""

    def draw(step: int) -> list[Rollout]:
        size, n = parts.config.rollout.prompts, parts.config.rollout.n
        prompts = prompts_of_step(parts.pool, size=size, seed=parts.config.run.seed, step=step)
        mine = distributed.share(list(enumerate(prompts)))
        keys = [f"step {step}/{place}" for place, _ in mine]
        return parts.sampler.generate([p for _, p in mine], parts.sampling, n=n, keys=keys)

    rollouts = draw(step) if parts.ahead is None else parts.ahead(step, draw)
    return fresh(parts.config, rollouts, step)


def graded(parts: Parts, rollouts: Sequence[Rollout]) -> list[Graded]:
    """Verdicts on the rollouts that can be graded: the training accuracy."""
    known = [r for r in rollouts if r.prompt.answer is not None]
    verdicts = parts.grader.grade_many([(parts.renderer.text(r.ids), r.prompt.answer or "") for r in known])
    return [
        Graded(rollout=r, correct=v.correct, extracted=v.extracted)
        for r, v in zip(known, verdicts, strict=True)
    ]
