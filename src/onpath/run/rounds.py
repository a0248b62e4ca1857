"""The micro-batches of a step. Where models are sharded each pass is an exchange, so that every process makes
as many with each teacher: one that has fewer goes on with a token that weighs nothing."""

from functools import cache

import torch

from onpath.data.batch import micro_batches
from onpath.engines.forward import teacher_key
from onpath.engines.head import sharded, width_of
from onpath.engines.sharding import sum_now
from onpath.methods.base import Prepared
from onpath.records import Prompt, Rollout, Sampling, Trajectory
from onpath.run.parts import Parts
from onpath.system import distributed


@cache
def _filler(teacher: str | None) -> Trajectory:
    """The token, of one teacher's."""
    prompt = Prompt(id="filler", text="", teacher=teacher)
    return Trajectory(
        student_context=(0,),
        teacher_context=(0,),
        response=(0,),
        weights=(0.0,),
        behaviour_logprobs=(0.0,),
        advantages=(0.0,),
        origin=Rollout(
            prompt=prompt, ids=(0,), logprobs=(0.0,), finish_reason="length", policy_version=0,
            sampling=Sampling(),
        ),
    )  # fmt: skip


def rounds(parts: Parts, prepared: Prepared, trained: list[Trajectory]) -> list[list[Trajectory]]:
    """What each forward and backward pass of this process runs along.

    Args:
        trained: trajectories of this process; none where no process has any.
    """
    models, most = parts.models, parts.config.optim.micro_batch_tokens
    if not sharded(models.student):
        return prepared.kept.batches(trained, max_tokens=most, device=models.device)
    micros = list(micro_batches(trained, max_tokens=most, device=models.device))
    found: list[list[Trajectory]] = []
    for name in sorted(models.teacher.names, key=lambda name: name or ""):  # as micro_batches has them
        mine = [micro for micro in micros if micro[0].teacher == name]
        count = distributed.most(len(mine))
        found += mine + [[_filler(name)]] * (count - len(mine))
        teacher = models.teacher.of(name).model
        if count and teacher is not None and sharded(teacher):
            theirs = [t for t in trained if t.teacher == name]
            _score_together(parts, prepared, theirs, name, width_of(teacher))
    return found


def is_filler(micro: list[Trajectory]) -> bool:
    """Whether a pass is made for the other processes only."""
    return micro[0] is _filler(micro[0].teacher)


def _score_together(
    parts: Parts, prepared: Prepared, trained: list[Trajectory], name: str | None, size: int
) -> None:
    """What `prepare` has scored is used again by all processes or by none.

    Args:
        trained: the trajectories of one teacher, of this name.
        size: of its hidden states.
    """
    kept, device = prepared.kept, parts.models.device
    if distributed.anywhere(not kept.has_scored(trained), device):
        kept.forget(name)
    else:
        kept.teacher[teacher_key(_filler(name))] = torch.zeros(1, size, device=device)


def sum_when_needed(parts: Parts, *, last: bool) -> None:
    """Gradients of all weights are summed over processes with each pass: they are as large as the weights,
    and would wait whole on each. Those of an adapter wait for the last pass, unless they are to be looked at.
    """
    lora, looked_at = parts.config.student.lora_rank > 0, parts.guidance_ratio.due
    sum_now(parts.models.student, last or looked_at or not lora)
