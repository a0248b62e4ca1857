"""Which tokens count: the share drawn by lot."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from onpath.config.sections import Reward as RewardSection
from onpath.config.whole import Config
from onpath.methods.base import Prepared
from onpath.records import Guidance, Trajectory
from onpath.run.assemble import assemble
from onpath.run.optimizer import make_optimizer
from onpath.run.sampling import prepare, sample
from onpath.run.weights import shaped, thinned
from onpath.system.draws import noise
from onpath.system.errors import UserError
from onpath.training import one_step

Tiny = Callable[..., Config]


def test_the_loss_is_the_mean_over_the_tokens_that_stay(tiny: Tiny) -> None:
    """Against all tokens' divergences, of the same rollouts and weights."""
    whole, part = (assemble(tiny(method__random_share=share)) for share in (1.0, 0.4))
    both = (whole, part)
    meters = [one_step(p, make_optimizer(p.config, p.models.student)[0], 0) for p in both]
    values, kept = [], 0
    for place, t in enumerate(meters[0].step.prepared.trajectories):
        assert t.origin is not None
        seed = whole.config.run.seed
        stays = noise(seed, f"step 0/{t.origin.key}/share", len(t.response)) < 0.4
        row = meters[0].per_token[place]["reverse_kl"]
        values += [v for v, s in zip(row, stays, strict=True) if s]
        kept += int(stays.sum())
    rows = [m.row(parts.models.device) for m, parts in zip(meters, both, strict=True)]
    assert rows[1]["tokens"] == kept
    assert 0.25 < kept / rows[0]["tokens"] < 0.55
    assert rows[1]["loss"] == pytest.approx(sum(values) / kept, rel=1e-5)
    assert rows[1]["loss"] != pytest.approx(rows[0]["loss"], rel=1e-4)


def test_it_multiplies_and_differs_from_step_to_step() -> None:
    t = Trajectory(
        student_context=(1,),
        teacher_context=(1,),
        response=tuple(range(50)),
        weights=(2.0,) * 25 + (0.0,) * 25,
        counted=(True,) * 30 + (False,) * 20,
    )
    one, two = (thinned(t, 0.5, seed=0, key=f"step {i}") for i in range(2))
    assert one != two
    assert set(one.token_weights[:25]) == {0.0, 2.0}
    assert not any(one.token_weights[25:])
    assert not any(one.in_count[30:])
    assert any(one.in_count[25:30]) or any(two.in_count[25:30]), (
        "what others have brought to 0 stays in the count"
    )
    assert thinned(t, 0.5, seed=0, key="step 0") == one


def test_windows_of_one_rollout_have_lots_of_their_own(tiny: Tiny) -> None:
    topd = {"method__name": "topd", "method__window": 6, "method__plan": "spliced", "method__top_share": 0.3}
    parts = assemble(tiny(method__random_share=0.5, **topd))
    made = shaped(parts, prepare(parts, sample(parts, 0), 0), step=0)
    by_origin: dict[str, list[tuple[float, ...]]] = {}
    for t in made.trajectories:
        assert t.origin is not None
        by_origin.setdefault(t.origin.key, []).append(t.token_weights)
    several = [masks for masks in by_origin.values() if len(masks) > 2]
    assert several
    alike = [a[: len(b)] == b[: len(a)] for masks in several for a, b in itertools.combinations(masks, 2)]
    assert sum(alike) < len(alike) / 2


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_is_one(share: float, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"random_share"):
        tiny(method__random_share=share)


def test_guidance_goes_with_the_tokens_that_leave() -> None:
    targets = tuple({i: 1.0} for i in range(30))
    t = Trajectory(
        student_context=(1,),
        teacher_context=(1,),
        response=tuple(range(50)),
        guidance=(Guidance(start=10, targets=targets), Guidance(start=45, targets=targets[:5])),
    )
    left = thinned(t, 0.4, seed=0, key="step 0")
    guided = {g.start + i: target for g in left.guidance for i, target in enumerate(g.targets)}
    stay = {i for i, counted in enumerate(left.in_count) if counted}
    assert set(guided) == stay & {*range(10, 40), *range(45, 50)}
    assert all(target == {at - 10 if at < 40 else at - 45: 1.0} for at, target in guided.items())


def test_first_tokens_are_those_of_the_whole_response(tiny: Tiny) -> None:
    """A further branch has what stands before it in its context."""
    options = {"method__name": "branch", "method__branches": 2, "method__failed_only": False}
    parts = assemble(tiny(**options, method__first_tokens=4, data__eval={}))
    made = parts.method.prepare(sample(parts, 0), step=0)
    assert any(t.begins > 0 for t in made.trajectories)
    for t in shaped(parts, made).trajectories:
        assert t.begins + len(t.response) <= max(4, t.begins)


def test_a_line_break_in_the_context_is_no_token_of_the_response(tiny: Tiny) -> None:
    """TRD's plain contexts end with one."""
    options = {"method__name": "trd", "method__paper_compat": True, "method__gate": False}
    parts = assemble(tiny(**options, method__template="{problem}{attempt}", data__template="plain"))
    parts = replace(parts, config=tiny(**options, method__first_tokens=3, data__template="plain"))
    made = prepare(parts, sample(parts, 0), 0)
    long = [t for t in made.trajectories if t.edit.kept and len(t.response) > 3]
    assert long
    assert {len(t.response) for t in shaped(parts, replace(made, trajectories=long)).trajectories} == {3}


def test_a_rewards_weight_reaches_the_guidance(tiny: Tiny) -> None:
    section = RewardSection.model_validate({"name": "w.py:w", "weights_tokens": True})
    for plan in ("transport", "teacher_window_ce"):
        options = {"method__name": "topd", "method__window": 4, "method__top_share": 0.5}
        parts = assemble(tiny(**options, method__plan=plan, data__eval={}))
        parts = replace(parts, config=parts.config.model_copy(update={"rewards": {"w": section}}))
        rollouts = sample(parts, 0)
        made = prepare(parts, rollouts, 0)
        values = [float(i % 3) for i in range(len(rollouts))]
        checked = set()
        for before, t in zip(made.trajectories, shaped(parts, made, {"w": values}).trajectories, strict=True):
            mass, old = (
                sum(p for g in x.guidance for y in g.targets for p in y.values()) for x in (t, before)
            )
            weights = {round(w, 6) for w in t.token_weights}
            value = values[t.origin.place] if t.origin else 0.0
            if old:
                checked.add(value)
                assert mass / old == pytest.approx(value * mass_of_one(made, values), rel=1e-5)
                assert plan == "teacher_window_ce" or weights <= {round(mass / old, 6), 0.0}
        assert len(checked) == 3


def mass_of_one(made: Prepared, values: list[float]) -> float:
    """What scales the values to mean 1 over the tokens."""
    kept = [t for t in made.trajectories if t.edit.kept and t.origin is not None]
    tokens = sum(sum(t.token_weights) for t in kept)
    return tokens / sum(values[t.origin.place] * sum(t.token_weights) for t in kept if t.origin)


def test_weights_of_a_reward_are_scaled_over_what_another_one_leaves(tiny: Tiny) -> None:
    """In either order."""
    sections = {"w": {"name": "w.py:w", "weights_tokens": True}, "keep": {"name": "k.py:k", "at_least": 0.5}}
    found = []
    for order in (["w", "keep"], ["keep", "w"]):
        parts = assemble(tiny(data__eval={}))
        rewards = {name: RewardSection.model_validate(sections[name]) for name in order}
        parts = replace(parts, config=parts.config.model_copy(update={"rewards": rewards}))
        rollouts = sample(parts, 0)
        values = {
            "w": [float(1 + 9 * (i % 2)) for i in range(len(rollouts))],
            "keep": [float(i % 2 == 0 or i == 1) for i in range(len(rollouts))],
        }
        kept = [t for t in shaped(parts, prepare(parts, rollouts, 0), values).trajectories if t.edit.kept]
        weights = [w for t in kept for w in t.token_weights]
        assert sum(weights) / len(weights) == pytest.approx(1)
        found.append(weights)
    assert found[0] == pytest.approx(found[1])
    assert len(set(found[0])) == 2
