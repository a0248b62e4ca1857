"""Which tokens count: the share drawn by lot."""

from collections.abc import Callable

import pytest

from onpath.config.build import Config
from onpath.records import Trajectory
from onpath.run.assemble import assemble
from onpath.run.optimizer import make_optimizer
from onpath.run.weights import thinned
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
    one, two = (thinned(t, 0.5, seed=0, when=f"step {i}") for i in range(2))
    assert one != two
    assert set(one.token_weights[:25]) == {0.0, 2.0}
    assert not any(one.token_weights[25:])
    assert not any(one.in_count[30:])
    assert any(one.in_count[25:30]) or any(two.in_count[25:30]), (
        "what others have brought to 0 stays in the count"
    )
    assert thinned(t, 0.5, seed=0, when="step 0") == one


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_is_one(share: float, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"random_share"):
        tiny(method__random_share=share)
