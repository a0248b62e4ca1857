"""bridge: where it starts, how long it is, who goes on, and when it is kept; against plain loops."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from onpath import config as configuration
from onpath.records import Rollout, Trajectory
from onpath.run.parts import Parts
from onpath.system.errors import UserError
from onpath.training import sample
from onpath.transport.plans import window_divergence
from tests.methods.family import Tiny, logp_after, logps_along, parts_of, prepared

OPTIONS: dict[str, Any] = {
    "window": 9, "distance": 0.5, "meet_window": 3, "every": 2, "meet_distance": 0.8, "failed_only": False,
}  # fmt: skip


def greedy(parts: Parts, model: nn.Module, prefix: Sequence[int], count: int) -> tuple[int, ...]:
    found: list[int] = []
    while len(found) < count and not (found and found[-1] in parts.stops.ids):
        found.append(int(logp_after(model, (*prefix, *found)).argmax()))
    return tuple(found)


def meetings(parts: Parts, prefix: Sequence[int], window: tuple[int, ...], near: float) -> list[int]:
    """By the docstring, one comparison after the other: all lengths at which the futures have met."""
    table, found = parts.models.student.get_input_embeddings().weight.detach(), []
    for n in range(2, len(window) - 3 + 1, 2):
        ours = greedy(parts, parts.models.student, (*prefix, *window[:n]), 3)
        distance, _ = window_divergence(
            student_ids=torch.tensor(ours), teacher_ids=torch.tensor(window[n : n + 3]), embedding=table
        )
        found += [n] if float(distance) <= near else []
    return found


@pytest.mark.parametrize("near", [0.8, 0.95])
def test_it_is_the_plain_loop(near: float, tiny: Tiny) -> None:
    parts = parts_of(tiny, name="bridge", keep="all", **{**OPTIONS, "meet_distance": near})
    topd = parts_of(tiny, name="topd", window=9, decide="threshold", threshold=0.5)
    rollouts = sample(parts, 0)
    done = parts.method.prepare(rollouts, step=0)
    lengths, often = [], 0
    for r, t, found in zip(rollouts, done.trajectories, prepared(topd).trajectories, strict=True):
        real = [f for f in found.edit.detail["forks"] if f["decision"] == "fork"]
        if not real:
            assert (t.response, t.edit.kind) == (r.ids, "none")
            continue
        at, window = real[0]["position"], tuple(real[0]["teacher_window"])
        met = meetings(parts, r.prefix(at), window, near)
        n, often = min(met, default=len(window)), often + (len(met) > 1)
        assert t.response[: at + n] == r.ids[:at] + window[:n]
        assert t.written_by == (
            *["student"] * at,
            *["teacher"] * n,
            *["student"] * (len(t.response) - at - n),
        )
        ended = t.response[-1] in parts.stops.ids or len(t.response) == parts.sampling.max_new_tokens
        assert ended
        lengths.append((n, len(window)))
    assert any(n < size for n, size in lengths), "some met"
    assert often or near < 0.9, "some at more than one place: the first counts"
    assert any(n == size for n, size in lengths), "some never did"
    assert done.totals["student_tokens_generated"] > 0


@pytest.mark.parametrize("control", ["none", "own_token"])
def test_only_better_ones_are_kept(control: str, tiny: Tiny) -> None:
    """Without verdicts that differ: by the teacher's log-prob of the student's words behind the bridge, of
    which there may be none, against those behind the fork."""
    given = {**OPTIONS, "control": control}
    every, better = (parts_of(tiny, name="bridge", keep=k, **given) for k in ("all", "better"))
    rollouts = sample(every, 0)
    bridged, kept = (p.method.prepare(rollouts, step=0).trajectories for p in (every, better))
    outcomes = set()
    for r, z, t in zip(rollouts, bridged, kept, strict=True):
        if z.edit.kind == "none":
            continue
        at = z.edit.detail["places"][0]
        behind = at + z.written_by.count("teacher")
        begins = {z.response: behind, r.ids: at}
        ours, theirs = (mean_logp(every, r, ids, t) for ids, t in begins.items())
        outcomes.add(ours > theirs)
        assert t.response == (z.response if ours > theirs else r.ids)
        assert t.edit.kind == ("bridge" if ours > theirs else "none")
    assert outcomes == {True, False}


def mean_logp(parts: Parts, r: Rollout, ids: tuple[int, ...], at: int) -> float:
    t = Trajectory(student_context=r.context, teacher_context=r.context, response=ids)
    logp = logps_along(parts.models.teacher.model, t).gather(-1, torch.tensor(ids)[:, None])[at:]
    return float(logp.mean()) if len(logp) else -math.inf


def test_a_repaired_response_is_better(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(tiny, name="bridge", keep="better", **OPTIONS)
    rollouts = sample(parts, 0)
    own = {r.ids for r in rollouts}
    for wanted in (True, False):
        monkeypatch.setattr(
            type(parts.text), "right",
            lambda self, pairs, w=wanted: [(tuple(ids) not in own) is w for _, ids in pairs],
        )  # fmt: skip
        kinds = {t.edit.kind for t in parts.method.prepare(rollouts, step=0).trajectories}
        assert ("bridge" in kinds) is wanted


def test_controls(tiny: Tiny) -> None:
    rule, own, lot = (
        parts_of(tiny, name="bridge", keep="all", control=c, **OPTIONS)
        for c in ("none", "own_token", "random_place")
    )
    rollouts = sample(rule, 0)
    made = [p.method.prepare(rollouts, step=0).trajectories for p in (rule, own, lot)]
    places = [[t.edit.detail.get("places") for t in of] for of in made]
    assert places[0] == places[1] != places[2]
    assert all(set(t.written_by) == {"student"} for t in made[1])
    assert any(t.response != r.ids for t, r in zip(made[1], rollouts, strict=True))
    for r, t, at in zip(rollouts, made[2], places[2], strict=True):
        if at:
            window = greedy(lot, lot.models.teacher.model, r.prefix(at[0]), t.written_by.count("teacher"))
            assert t.response[at[0] : at[0] + len(window)] == window


def test_the_sampled_gradient_is_refused() -> None:
    with pytest.raises(UserError, match="use reverse_kl"):
        configuration.build({"method": {"name": "bridge", "divergence": "sampled"}})


@pytest.mark.parametrize(
    ("window", "control", "said"), [(11, "none", 1), (12, "none", 0), (11, "own_token", 0)]
)
def test_a_window_too_short_to_meet_is_said(window: int, control: str, said: int, tiny: Tiny) -> None:
    parts = parts_of(tiny, name="bridge", window=window, control=control)
    assert sum("from 12 on it ends where they meet" in w for w in parts.warnings) == said
