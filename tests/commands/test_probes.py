"""The prefix-failure probe and the cosine of gradients."""

import json
from collections.abc import Callable
from math import exp
from pathlib import Path

import pytest
import torch
from torch import nn

from onpath.commands.probes.command import shown
from onpath.commands.probes.prefix_failure import Probed, positions, probe, run_probe, summarise
from onpath.config.build import Config
from onpath.run.assemble import assemble
from onpath.run.gradient_cosine import GradientCosine
from onpath.system.errors import UserError
from tests.methods.test_trd import logps


def test_one_position_is_right_before_the_error() -> None:
    assert positions(10, None, 4) == (0, 4, 8)
    assert positions(10, 6, 4) == (2, 6)
    assert positions(0, None, 4) == ()


def test_probe_of_a_tiny_pair(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(method__name="opd", data__limit=6, rollout__prompts=6)
    parts = assemble(config)
    path = run_probe(parts, rollouts=6, continuations=3, every=5, out=tmp_path / "probe")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["positions"] == list(range(0, len(row["tokens"]), 5))
        assert len(row["failed"]) == len(row["student"]) == len(row["teacher"]) == len(row["positions"])
        assert len(row["onset_mass"]) == len(row["token_probability"]) == len(row["tokens"])
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert json.loads(path.with_suffix(".json").read_text())["rollouts"] == 6


def test_modes_are_the_teachers(tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny(method__name="opd", data__limit=3, rollout__prompts=3))
    (r, *_) = parts.generators.student.generate(
        parts.prompts.pool, parts.sampling, keys=[f"probe/{p.id}" for p in parts.prompts.pool]
    )
    found = {p.prompt_id: p for p in probe(parts, rollouts=3, continuations=1, every=50)}[r.prompt.id]
    theirs = logps(parts.models.teacher.model, r.context, r.ids)
    own = [exp(row[i]) for row, i in zip(theirs.tolist(), r.ids, strict=True)]
    assert found.token_probability == pytest.approx(own, abs=1e-5)
    mass = theirs[:, list(parts.tools.text.correction_ids)].exp().sum(-1).tolist()
    assert found.onset_mass == pytest.approx(mass, abs=1e-5)


def test_summary_by_hand() -> None:
    wrong = Probed(
        prompt_id="a",
        right=False,
        tokens=("x", "y", "z", "."),
        first_error=2,
        positions=(0, 2),
        trials=4,
        student=(2, 0),
        teacher=(4, 0),
        onset_mass=(0.0, 0.1, 0.4, 0.6),
        token_probability=(1.0, 0.8, 0.5, 0.3),
    )
    found = summarise([wrong], epsilon=0.1)
    before, after = found["wrong, not failed"], found["wrong, failed"]
    assert before == {
        "tokens": 2,
        "student_success": 0.5,
        "teacher_success": 1.0,
        "onset_mass": pytest.approx(0.05),
        "student_token_probability": pytest.approx(0.9),
    }
    assert after["onset_mass"] == pytest.approx(0.5)
    assert found["right rollouts"]["onset_mass"] is None


@pytest.mark.parametrize("name", ["rollouts", "continuations", "every"])
def test_probe_refuses_nothing_to_do(tiny: Callable[..., Config], tmp_path: Path, name: str) -> None:
    numbers = {"rollouts": 2, "continuations": 2, "every": 2, name: 0}
    with pytest.raises(UserError, match=f"{name} is 0"):
        run_probe(assemble(tiny(method__name="opd")), **numbers, out=tmp_path)


def test_cosine_of_consecutive_gradients() -> None:
    model = nn.Linear(2, 1, bias=False)
    directions = [(1.0, 0.0), (0.0, 2.0), (1.0, 1.0), (-3.0, -3.0)]

    def measured(every: int, start: int = 0) -> list[float | None]:
        cosine, found = GradientCosine(model, every=every), []
        for step, g in list(enumerate(directions))[start:]:
            model.weight.grad = torch.tensor([g])
            found.append(cosine(step))
        return found

    assert measured(1) == [None, pytest.approx(0.0), pytest.approx(0.5**0.5), pytest.approx(-1.0)]
    assert measured(2) == [None, None, pytest.approx(0.5**0.5), None]
    assert measured(0) == [None] * 4
    assert measured(1, start=2) == [None, pytest.approx(-1.0)], "a resumed run has not seen the last gradient"


def test_a_summary_for_people(tmp_path: Path) -> None:
    summary = {"rollouts": 2, "noise_floor": {"mean": 0.0345547, "quartiles": [0.0, 0.25, 1.0]}, "gap": None}
    (tmp_path / "divergence.json").write_text(json.dumps(summary))
    assert list(shown(tmp_path / "divergence.jsonl")) == [
        "rollouts: 2",
        "noise floor: mean 0.0346, quartiles 0 0.25 1",
        "gap: –",
        f"{tmp_path / 'divergence.jsonl'}, summary divergence.json, picture divergence.png",
    ]
