"""branch: the forced token, the shared prefix, the student's suffixes; token by token against full logits."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp

import pytest
import torch

from onpath import config as configuration
from onpath.data.batch import collate
from onpath.engines.decoding.draw import draw
from onpath.methods.branch import Branch
from onpath.records import Sampling, Trajectory
from onpath.run.importance import Importance
from onpath.run.parts import Parts
from onpath.system.draws import noise
from onpath.system.errors import UserError
from onpath.training import sample
from tests.methods.family import Tiny, logp_after, logps_along, parts_of, prepared


def whole(t: Trajectory) -> tuple[int, ...]:
    """Prompt and response, wherever the context ends."""
    return t.student_context + t.response


def suffix(parts: Parts, prefix: Sequence[int], key: str, count: int) -> tuple[int, ...]:
    """The student's, one token at a time, without a cache."""
    found: list[int] = []
    uniforms = noise(parts.sampling.seed, key, parts.sampling.max_new_tokens)
    while len(found) < count and not (found and found[-1] in parts.stops.ids):
        logits = logp_after(parts.models.student, (*prefix, *found))[None]
        found.append(int(draw(logits, Sampling(), torch.from_numpy(uniforms[[len(found)]]))[0]))
    return tuple(found)


@pytest.mark.parametrize("place", ["reverse_kl", "sampled_gap"])
def test_branches_token_by_token(place: str, tiny: Tiny) -> None:
    parts = parts_of(tiny, name="branch", branches=2, place=place)
    rollouts = sample(parts, 0)
    made = iter(parts.method.prepare(rollouts, step=0).trajectories)
    for r, own in zip(rollouts, prepared(parts_of(tiny)).trajectories, strict=True):
        s, q = (logps_along(m, own) for m in (parts.models.student, parts.models.teacher.model))
        y = torch.tensor(r.ids)
        gap = (s - q).gather(-1, y[:, None])[:, 0]
        measure = (s.exp() * (s - q)).sum(-1) if place == "reverse_kl" else gap
        at = int(measure.masked_fill(q.argmax(-1) == y, -torch.inf).argmax())
        prefix = (*r.context, *r.ids[:at], int(q[at].argmax()))
        first, second = next(made), next(made)
        for i, t in enumerate((first, second)):
            count = parts.sampling.max_new_tokens - at - 1
            assert whole(t) == prefix + suffix(parts, prefix, f"step 0/{r.key}/branch {i}", count)
            assert t.edit.detail["places"] == [at]
            assert t.origin is r
        assert (first.student_context, second.student_context) == (r.context, prefix[:-1]), "counted once"
        assert first.written_by == (
            *["student"] * at,
            "forced",
            *["student"] * (len(first.response) - at - 1),
        )
        assert second.written_by == ("forced", *["student"] * (len(second.response) - 1))
        assert first.teacher_context == first.student_context
    assert next(made, None) is None


def test_right_rollouts_are_left_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(tiny, name="branch")
    rollouts = sample(parts, 0)
    right = {rollouts[0].ids, rollouts[3].ids}
    monkeypatch.setattr(
        type(parts.text), "right", lambda self, pairs: [tuple(ids) in right for _, ids in pairs]
    )
    done = parts.method.prepare(rollouts, step=0)
    assert [t.edit.kind == "none" for t in done.trajectories] == [r.ids in right for r in rollouts]
    assert done.trajectories[0].response == rollouts[0].ids
    assert done.totals["teacher_tokens_generated"] == 0
    assert done.totals["student_tokens_generated"] > 0


def test_only_right_branches_are_kept(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(tiny, name="branch", branches=3, keep="right")
    rollouts = sample(parts, 0)
    monkeypatch.setattr(
        type(parts.text), "right", lambda self, pairs: [sum(ids) % 3 == 0 for _, ids in pairs]
    )
    made = parts.method.prepare(rollouts, step=0).trajectories
    counts = [[t for t in made if t.origin is r] for r in rollouts]
    assert {len(mine) for mine in counts} >= {1, 2}
    for r, mine in zip(rollouts, counts, strict=True):
        assert mine[0].student_context == r.context, "somebody carries the prefix"
        for t in mine:
            response = whole(t)[len(r.context) :]
            assert response == r.ids or sum(response) % 3 == 0


def test_controls(tiny: Tiny) -> None:
    rule, own, lot = (parts_of(tiny, name="branch", control=c) for c in ("none", "own_token", "random_place"))
    rollouts = sample(rule, 0)
    made = [p.method.prepare(rollouts, step=0).trajectories for p in (rule, own, lot)]
    places = [[t.edit.detail["places"] for t in of] for of in made]
    assert places[0] == places[1] != places[2]
    for r, t, (at,) in zip(rollouts, made[1], places[1], strict=True):
        assert t.response[: at + 1] == r.ids[: at + 1]
        assert set(t.written_by) == {"student"}
    assert any(t.response != r.ids for r, t in zip(rollouts, made[1], strict=True))
    assert all(t.written_by[at] == "forced" for t, (at,) in zip(made[2], places[2], strict=True))


def test_a_forced_stop_ends_the_response(tiny: Tiny) -> None:
    parts = parts_of(tiny, name="branch")
    rollouts = sample(parts, 0)
    made = parts.method.prepare(rollouts, step=0).trajectories
    forced = {t.response[t.edit.detail["places"][0]] for t in made}
    parts.generators.student.stop_ids = parts.generators.student.stop_ids | forced
    for t in parts.method.prepare(rollouts, step=0).trajectories:
        assert len(t.response) == t.edit.detail["places"][0] + 1


def test_one_stop_for_another_is_no_disagreement(tiny: Tiny) -> None:
    """With `ends: one` the teacher's likeliest token is the outcome's first id, whichever was drawn."""
    parts = parts_of(tiny, name="branch", ends="one")
    method, ends = parts.method, parts.models.ends
    assert isinstance(method, Branch)
    if len(ends) < 2:
        ends = (*ends, 0) if ends else (0, 2)
        method.tools = replace(method.tools, models=replace(parts.models, ends=ends))
    y = replace(sample(parts, 0)[0], ids=(5, 6, ends[1]), logprobs=(-1.0,) * 3, finish_reason="stop")
    values = {
        "teacher_top_ids": [[5], [6], [ends[0]]], "reverse_kl": [0.1, 0.2, 9.0],
        "student_logp": [-1.0] * 3, "teacher_logp": [-2.0] * 3,
    }  # fmt: skip
    assert not method.forced(y, values, "k").changed


def test_the_sampled_gradient_is_refused() -> None:
    with pytest.raises(UserError, match="use reverse_kl"):
        configuration.build({"method": {"name": "branch", "divergence": "sampled"}})


def test_a_ratio_of_the_whole_is_that_of_the_prefix_too(tiny: Tiny) -> None:
    """On each branch, after the student has moved; the prefix is counted once, as it is without ratios."""
    options = {"name": "branch", "branches": 3, "importance_cap": 1e4}
    parts, plain = (parts_of(tiny, **options, importance=kind) for kind in ("sequence", "none"))
    rollouts = sample(parts, 0)
    made, apart = (p.method.prepare(rollouts, step=0).trajectories for p in (parts, plain))
    assert [whole(t) for t in made] == [whole(t) for t in apart]
    assert [sum(t.in_count) for t in made] == [len(t.response) for t in apart]
    with torch.no_grad():
        parts.models.student.model.norm.weight.mul_(1.02)
        batch = collate([replace(t, place=i) for i, t in enumerate(made)])
        hidden_NH = parts.models.student_states(batch)
        weights_N = Importance(kind="sequence", cap=1e4).weights(batch, hidden_NH, parts.models)
    for t, found, other in zip(made, batch.by_row(weights_N), apart, strict=True):
        now = logps_along(parts.models.student, t).gather(-1, torch.tensor(t.response)[:, None])[:, 0]
        drawn = zip(now.tolist(), t.behaviour_logprobs or (), t.written_by, strict=True)
        ratio = exp(sum(p - q for p, q, who in drawn if who == "student"))
        assert abs(ratio - 1) > 1e-3
        begins = other.begins
        expected = [1.0 if who == "forced" else ratio for who in t.written_by[begins:]]
        assert found == pytest.approx([0.0] * begins + expected, rel=1e-3)
    assert any(t.begins for t in apart)


@pytest.mark.parametrize("control", ["none", "own_token"])
def test_what_the_student_drew_has_what_it_was_drawn_with(control: str, tiny: Tiny) -> None:
    """On every branch: so that importance weighs them all, and by 1 where nothing is stale."""
    parts = parts_of(tiny, name="branch", branches=3, failed_only=False, control=control, importance="token")
    made = parts.method.prepare(sample(parts, 0), step=0).trajectories
    assert any(t.begins for t in made)
    for t in made:
        assert t.behaviour_logprobs is not None
        assert len(t.behaviour_logprobs) == len(t.response)
        own = logps_along(parts.models.student, t).gather(-1, torch.tensor(t.response)[:, None])[:, 0]
        for drawn, now, who in zip(t.behaviour_logprobs, own.tolist(), t.written_by, strict=True):
            assert who == "forced" or drawn == pytest.approx(now, abs=1e-4)
