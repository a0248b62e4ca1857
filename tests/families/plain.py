"""A step beside plain transformers, which reads one row at a time, in float32."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from onpath.config.whole import Config
from onpath.data.batch import collate, micro_batches
from onpath.records import Trajectory, token_count
from onpath.run.assemble import assemble
from onpath.run.loss import Step, loss_of, teacher_states
from onpath.training import sample
from tests.conftest import make_tokenizer
from tests.families.build import build

SMALL: dict[str, Any] = {"optim__micro_batch_tokens": 100, "rollout__max_new_tokens": 24, "data__eval": {}}


def pair(root: Path, family: str, **changes: Any) -> dict[str, str]:
    """A student and a teacher of a family, as options of a config."""
    for seed, name in enumerate(("student", "teacher")):
        build(family, seed, **changes).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return {f"{name}__model": str(root / name) for name in ("student", "teacher")}


def logps(model: Any, context: tuple[int, ...], response: tuple[int, ...], ids: int) -> Tensor:
    """[N, V] at the response's positions, of one row alone."""
    logits_TV = model(input_ids=torch.tensor([[*context, *response]])).logits[0, :, :ids]
    return logits_TV[len(context) - 1 : -1].log_softmax(-1)


def plain_step(
    student: Any, teacher: Any, made: list[Trajectory], count: float, ids: int
) -> tuple[float, float, list[float]]:
    """Loss, gradient norm, log-probs of the sampled tokens."""
    total, sampled = 0.0, []
    for t in made:
        ours = logps(student, t.student_context, t.response, ids)
        with torch.no_grad():
            theirs = logps(teacher, t.teacher_context, t.response, ids)
        loss = (ours.exp() * (ours - theirs)).sum() / count
        loss.backward()
        total += float(loss)
        sampled += ours.detach().gather(-1, torch.tensor(t.response)[:, None])[:, 0].tolist()
    return total, norm(student), sampled


def norm(model: nn.Module) -> float:
    return float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())


def compare(config: Config) -> str:
    """Empty if all is right, else what is not.

    Raises:
        UserError: refused.
    """
    parts = assemble(config)
    rollouts = sample(parts, 0)
    prepared = parts.method.prepare(rollouts, step=0)
    made = prepared.trajectories
    count = token_count(made)
    step, loss = Step(prepared=prepared, objective=parts.objective, denominator=count), 0.0
    micros = list(micro_batches(made, max_tokens=config.optim.micro_batch_tokens, device=parts.models.device))
    assert len(micros) > 1
    for micro in micros:
        batch = collate(micro, device=parts.models.device)
        part = loss_of(parts.models, batch, teacher_states(parts.models, batch, prepared), step).loss
        part.backward()
        loss += float(part)
    plain = [AutoModelForCausalLM.from_pretrained(c.model).eval() for c in (config.student, config.teacher)]
    expected, gradient, sampled = plain_step(plain[0], plain[1], made, count, parts.models.vocabulary)
    found = [p for r in rollouts for p in r.logprobs]
    gaps = {
        "loss": abs(loss / expected - 1) / 1e-4,
        "gradient": abs(norm(parts.models.student) / gradient - 1) / 1e-3,
        "log-probs": max(abs(a - b) for a, b in zip(found, sampled, strict=True)) / 1e-3,
    }
    return ", ".join(f"{name} {gap:.1e} of what is allowed" for name, gap in gaps.items() if not gap <= 1)
