"""The story: on-policy distillation of trajectories, one step after another.

    sample    the student generates                     engine.generate         → rollouts
    correct   the method edits or annotates them        method.prepare          → trajectories
    score     the teacher scores them                   teacher.scores          → hidden states
    train     divergence × weights ÷ global count       fused_objective         → gradients, clip, AdamW
    sync      the new weights to the engine             engine.sync_weights     → policy version + 1

Every random draw is a pure function of (seed, step): a run that is killed and started again goes on exactly.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from onpath import config as configuration
from onpath.config.whole import Config
from onpath.data.batch import collate
from onpath.engines import sharding
from onpath.engines.base import Engine
from onpath.records import token_count
from onpath.run.assemble import assemble
from onpath.run.directory import Run, RunResult
from onpath.run.evaluation import evaluate_all
from onpath.run.importance import Importance
from onpath.run.log import Display
from onpath.run.loss import Step, guidance_loss, loss_of, teacher_states
from onpath.run.meter import Meter, Stopwatch
from onpath.run.opening import open_run
from onpath.run.optimizer import finite, make_optimizer
from onpath.run.origins import judge, with_origins
from onpath.run.parts import Parts
from onpath.run.per_teacher import PerTeacher
from onpath.run.rescue import Rescue
from onpath.run.rounds import is_filler, rounds, sum_when_needed
from onpath.run.sampling import hand_over, prepare, sample
from onpath.run.trajectories import store_step, top_tokens
from onpath.run.weights import shaped
from onpath.system import distributed
from onpath.system.signals import stop_requests


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    method: Any = None,
    divergence: Callable[..., Any] | str | None = None,
    grader: Callable[[str, str], bool] | str | None = None,
    rewards: Mapping[str, Callable[..., float] | str] | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    engine: Engine | None = None,
    allow_code: bool = False,
    resume_with_changes: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Runs a config to its end, going on where an earlier process of the same config stopped.

    Args:
        config: see `onpath.config`; or its sections as a mapping, or the path of its YAML; None: the gym.
        method: a class derived from `onpath.methods.Method`, or an instance of its `Options`.
        divergence: a function of `teacher_logp` and `student_logp`, [..., V] → [...]: `method.divergence`.
        grader: a function of (text, answer), in place of `eval.grader`.
        rewards: label → function, beside those of the config (see `onpath.grade.rewards`). Names as YAML has
            them do in place of a method and of functions.
        train_dataset: a `datasets.Dataset`, or a list of mappings, in place of `data.train`.
        eval_dataset: likewise, or several by name, in place of `data.eval`.
        engine: generates rollouts and evaluations, in place of `rollout.engine`.
        allow_code: run the Python files that the config names.
        resume_with_changes: go on with a run even if its config, data or models are others than they were.
        quiet: no progress display; files are written all the same.

    Raises:
        UserError: something that the user can fix, in one sentence; nothing finished is lost.
    """
    config = configuration.with_own(
        config, method=method, divergence=divergence, grader=grader, rewards=rewards,
        train_dataset=train_dataset, eval_dataset=eval_dataset, allow_code=allow_code,
    )  # fmt: skip
    with distributed.one_fate():
        parts = assemble(config, engine=engine)
        with closing(open_run(config, parts, with_changes=resume_with_changes)) as run:
            if left := not run.finished:
                optimise(parts, run, quiet=quiet)
                run.save_model()
            else:
                run.say_finished(quiet=quiet)
            return run.result(trained=left)


def optimise(parts: Parts, run: Run, *, quiet: bool) -> None:
    """All optimiser steps that are left, with the evaluations and checkpoints that fall due."""
    config = parts.config
    optimizer, schedule = make_optimizer(config, parts.models.student)
    parts.generators.student.sync_weights(0)
    with parts.whole():
        run.note(parts.method.before_training(parts.prompts.pool, run.directory))
    done = run.resume(optimizer)
    shown = Display(steps=config.optim.steps, done=done, quiet=quiet or distributed.rank() > 0)
    with shown as display, stop_requests() as asked, Rescue(run, optimizer, done) as rescue:
        run.announce(display, done)
        if run.evaluates_first(done):
            run.judge(display, evaluate_all(parts, run, display, step=done))
        for step in run.steps_left(done):
            schedule(step)
            meter = one_step(parts, optimizer, step)
            row = run.log(step + 1, meter, lr=optimizer.param_groups[0]["lr"])
            rescue.reached(step + 1)
            display.step(row, config.method.nothing_found(row))
            last = step + 1 == config.optim.steps
            if last or config.eval.falls_on(step + 1):
                last |= run.judge(display, evaluate_all(parts, run, display, step=step + 1))
            store_step(parts, run.directory, meter, step + 1, last=last)
            stop = distributed.anywhere(bool(asked), parts.models.device)
            if last or stop or (config.run.save_every and (step + 1) % config.run.save_every == 0):
                run.checkpoint(step + 1, optimizer, wait=last or stop)
            if stop and not last:
                run.leave(asked, step + 1)


def one_step(parts: Parts, optimizer: torch.optim.Optimizer, step: int) -> Meter:
    """Sample, correct, score, train, sync: one optimiser step."""
    config, models, watch = parts.config, parts.models, Stopwatch()
    with parts.whole_step():
        meter = corrected(parts, step, watch)
        accumulate(parts, meter, step)
        meter.scored = models.teacher.measured()
    sharding.give_back(models.student, *models.teacher.models)
    with watch("train"):
        distributed.sum_gradients(models.student)
        meter.gradient_cosine = parts.gradient_cosine(step)
        meter.guidance_ratio = parts.guidance_ratio()
        trained = [p for p in models.student.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
        meter.grad_norm = finite(sharding.full(norm), step)
        if meter.step.denominator:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        models.teacher.follow()
        meter.metrics = meter.row(models.device)
        parts.method.after_step({**meter.metrics})
    hand_over(parts, meter, step + 1)
    return meter


def corrected(parts: Parts, step: int, watch: Stopwatch) -> Meter:
    """The step's trajectories, before a gradient is computed."""
    with parts.whole():
        with watch("sample"):
            rollouts = sample(parts, step)
        with watch("grade"):
            judged = judge(parts.text, rollouts)
        with watch("correct"):
            made, of_origins = with_origins(parts.text, prepare(parts, rollouts, step), rollouts, judged)
            prepared = shaped(parts, made, of_origins.rewards, step=step)
    kept = [t for t in prepared.trajectories if t.edit.kept]
    mine = [token_count(kept), float(any(t.guidance for t in kept))]
    denominator, guided = distributed.total(mine, parts.models.device)
    shared = Step(
        prepared=prepared,
        objective=parts.objective,
        denominator=denominator,
        importance=Importance(kind=parts.config.method.importance, cap=parts.config.method.importance_cap),
        guided=guided > 0,
        top_k=top_tokens(parts.config, step + 1),
    )
    return Meter(
        watch=watch,
        rollouts=rollouts,
        step=shared,
        judged=judged,
        of_origins=of_origins,
        drawn=None if parts.refreshed is None else parts.refreshed.generated(step),
        per_teacher=PerTeacher(names=parts.models.teacher.names),
    )


def accumulate(parts: Parts, meter: Meter, step: int) -> None:
    """Score and train: the gradient of the whole step, one micro-batch after another."""
    models, shared, watch = parts.models, meter.step, meter.watch
    kept = [t for t in shared.prepared.trajectories if t.edit.kept] if shared.denominator else []
    models.begin_training(seed=parts.config.run.seed, step=step)
    parts.guidance_ratio.begin(step, guided=shared.guided)
    micros = rounds(parts, shared.prepared, kept)
    models.teacher.expect(t for micro in micros for t in micro)
    for i, micro in enumerate(micros):
        batch = collate(micro, device=models.device)
        sum_when_needed(parts, last=i + 1 == len(micros))
        with watch("score"):
            teacher = teacher_states(models, batch, shared.prepared)
        with watch("train"):
            result = loss_of(models, batch, teacher, shared)
            result.loss.backward()
            parts.guidance_ratio.add(partial(guidance_loss, models, batch, teacher, shared))
        if not is_filler(micro):
            meter.add(batch, result)
