"""The prefix-failure probe and the cosine of gradients."""

import json
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onpath import config as configuration
from onpath.commands.cli import main
from onpath.commands.probes.base import sampled
from onpath.commands.probes.command import run_named, shown
from onpath.commands.probes.predictors import TRIGGER, Scored, late_skills, predictors, score
from onpath.commands.probes.prefix_failure import Probed, positions, probe, run_probe, summarise
from onpath.config.whole import Config
from onpath.engines.hf import HFEngine
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
    summary = json.loads(path.with_suffix(".json").read_text())
    assert (summary["rollouts"], summary["student"]) == (6, config.student.model)


def test_a_config_is_not_probed_into_its_run(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(method__name="opd")
    run, path = Path(config.run.dir) / config.run.name, tmp_path / "its.yaml"
    run.mkdir(parents=True)
    for place in (path, run / "config.yaml"):
        place.write_text(config.to_yaml())
    for place in (path, run / "config.yaml"):
        with pytest.raises(UserError, match=f"{place}: its run is in {run} already"):
            run_named("divergence", place)
    assert not (run / "probes").exists()


def test_modes_are_the_teachers(tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny(method__name="opd", data__limit=3, rollout__prompts=3))
    (r, *_) = parts.generators.student.generate(
        parts.prompts.pool, parts.sampling, keys=[f"probe/{p.id}" for p in parts.prompts.pool]
    )
    made = sampled(parts, 3)
    found = {
        p.prompt_id: p for p in probe(parts, made, [m.context for m in made], continuations=1, every=50)
    }[r.prompt.id]
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
    (tmp_path / "divergence.png").touch()
    assert list(shown(tmp_path / "divergence.jsonl")) == [
        "rollouts: 2",
        "noise floor: mean 0.0346, quartiles 0 0.25 1",
        "gap: –",
        f"{tmp_path / 'divergence.jsonl'}, summary divergence.json, picture divergence.png",
    ]


def scored(first: int | None, **changes: Any) -> Scored:
    tokens = list("abcde")
    given: dict[str, Any] = {
        "tokens": tokens,
        "right": first is None,
        "first": first,
        "reverse_kl": [1.0, 2.0, 3.0, 4.0, 5.0],
        "teacher_entropy": [0.1] * 5,
        "log_ratio": [0.0] * 5,
        "wanted": tokens,
        "sound": [1.0, None, 0.75, 0.25, 1.0],
        "skills": ["s", "", "t", "t", "u"],
    }
    return Scored(**given | changes)


def test_predictors_by_hand() -> None:
    found = predictors([scored(1), scored(None, reverse_kl=[0.0] * 5)])
    assert found["tokens_behind_first_error"] == pytest.approx(3 / 10)
    assert found["loss_behind_first_error"] == pytest.approx(12 / 15)
    assert found["teacher_before"] == {
        "tokens": 7,
        "next_step_sound": pytest.approx(4 / 5),  # where it is known
        "entropy_nats": pytest.approx(0.1),
    }
    assert found["teacher_behind"]["next_step_sound"] == pytest.approx(2 / 3)
    # The first fifth is one token: t and u are never seen there.
    late = late_skills([scored(1)])
    assert late["share_of_skills"] == pytest.approx(2 / 3)
    assert late["share_of_loss"] == pytest.approx(12 / 13)
    assert late["by_chance"] == pytest.approx((1 * 0.8 + 7 * 0.8**2 + 5 * 0.8) / 13)
    assert predictors([])["tokens_behind_first_error"] is None


def test_without_a_checker_the_ratio_says_where_it_went_wrong(tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny(method__name="opd", data__limit=4, rollout__prompts=4))
    made = sampled(parts, 4)
    found = score(parts.models, parts.text, made, [r.context for r in made])
    for s, r in zip(found, made, strict=True):
        theirs = logps(parts.models.teacher.model, r.context, r.ids)
        assert s.wanted == parts.text.renderer.tokens(theirs.argmax(-1).tolist())
        own = logps(parts.models.student, r.context, r.ids)
        ratio = [float(own[i, t] - theirs[i, t]) for i, t in enumerate(r.ids)]
        assert s.log_ratio == pytest.approx(ratio, abs=1e-4)
        above = [i for i, value in enumerate(ratio) if value > TRIGGER]
        assert s.first == (None if s.right or not above else above[0])
        assert s.skills == s.wanted
        assert set(s.sound) <= {None}


def test_the_meter_reads_once_and_needs_no_answers(
    tiny: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is gone on from; as everywhere without a checker a loud token is taken for the first error."""
    (data := tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i} + 5?"}}\n' for i in range(6)))
    config = tiny(data__train=str(data), data__eval={}, rollout__prompts=6, eval__grader="exact")
    (file := tmp_path / "its.yaml").write_text(config.to_yaml())
    generated: list[int] = []
    plain = HFEngine.continue_from

    def counted(self: HFEngine, prefixes: Any, *given: Any, **named: Any) -> Any:
        generated.append(len(prefixes))
        return plain(self, prefixes, *given, **named)

    monkeypatch.setattr(HFEngine, "continue_from", counted)
    path = run_named("meter", file, rollouts=6)
    assert (generated[-1], generated.count(6)) == (6, 1), "behind the start-up checks of a few"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    told = json.loads(path.with_suffix(".json").read_text())
    behind = sum(len(r["tokens"]) - r["first"] - 1 for r in rows if r["first"] is not None)
    assert told["tokens_behind_first_error"] == pytest.approx(behind / sum(len(r["tokens"]) for r in rows))
    assert not any(r["right"] for r in rows)
    assert list(shown(path))[-1] == f"{path}, summary meter.json"
    capsys.readouterr()
    assert main(["inspect", str(file), "--probe", "meter", "--rollouts", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told, "the same numbers, for machines"


def test_a_world_shows_in_its_predictors() -> None:
    """With the gym's truth: a spoiled world has more tokens behind an error; a lost teacher errs there."""
    found = {}
    for name, train in {"plain": "gym:train", "late": "gym:train?late=1&spoil=1&lost=1"}.items():
        config = configuration.build(
            {
                "data": {"train": train, "limit": 24, "eval": {}},
                "rollout": {"prompts": 24, "max_new_tokens": 80},
                "student": {"device": "cpu"},
            }
        )
        parts = assemble(config)
        made = sampled(parts, 24)
        found[name] = predictors(score(parts.models, parts.text, made, [r.context for r in made]))
    plain, late = found["plain"], found["late"]
    assert late["tokens_behind_first_error"] > 0.5 > plain["tokens_behind_first_error"]
    assert plain["teacher_behind"]["next_step_sound"] > 0.97
    assert late["teacher_behind"]["next_step_sound"] < plain["teacher_behind"]["next_step_sound"] - 0.03
    assert late["teacher_before"]["next_step_sound"] > 0.97
