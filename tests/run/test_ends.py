"""`method.ends: one`: what methods read of both models takes all ends for one outcome, as the loss does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onpath.config import Config
from onpath.engines.forward import per_token
from onpath.methods.base import own_response
from onpath.run.assemble import assemble
from onpath.run.parts import Parts
from onpath.run.sampling import prepare, sample
from tests.conftest import make_model, make_tokenizer

Tiny = Callable[..., Config]
ENDS = [2, 5, 7]


@pytest.fixture
def swapped(tmp_path: Path) -> dict[str, str]:
    """A student, and a teacher that is it but for the ids of its ends, which are turned by one."""
    student, teacher = make_model(0, tied=False), make_model(0, tied=False)
    with torch.no_grad():
        teacher.lm_head.weight[ENDS] = student.lm_head.weight[ENDS[1:] + ENDS[:1]]
    for name, model in {"student": student, "teacher": teacher}.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return {"student__model": str(tmp_path / "student"), "teacher__model": str(tmp_path / "teacher")}


def parts_with(tiny: Tiny, swapped: dict[str, str], **options: object) -> Parts:
    return assemble(tiny(**swapped, rollout__stop_ids=ENDS[1:], data__eval={}, **options))


@pytest.mark.parametrize("ends", ["apart", "one"])
def test_statistics_are_of_what_the_loss_compares(ends: str, tiny: Tiny, swapped: dict[str, str]) -> None:
    parts = parts_with(tiny, swapped, method__ends=ends)
    found = per_token(parts.models, [own_response(r) for r in sample(parts, 0)])
    largest = max(abs(v) for values in found for v in values["reverse_kl"])
    gaps = [s - t for v in found for s, t in zip(v["student_logp"], v["teacher_logp"], strict=True)]
    assert (largest < 1e-5) is (ends == "one")
    assert (max(map(abs, gaps)) < 1e-4) is (ends == "one")


@pytest.mark.parametrize("ends", ["apart", "one"])
def test_another_end_is_nothing_to_relay(ends: str, tiny: Tiny, swapped: dict[str, str]) -> None:
    parts = parts_with(tiny, swapped, method__name="relay", method__ends=ends, method__delta=0.01)
    rollouts = sample(parts, 0)
    assert any(r.ids[-1] in ENDS for r in rollouts)
    made = prepare(parts, rollouts, 0).trajectories
    assert ([t.response for t in made] == [r.ids for r in rollouts]) is (ends == "one")
