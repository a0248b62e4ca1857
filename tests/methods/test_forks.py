"""TOPD's decisions and targets, by hand: candidates, forks, suppression, plans, guidance, records."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onpath.config.methods.topd import TOPDOptions
from onpath.methods.topd import candidates, decide, guide
from onpath.methods.topd.candidates import Fork
from onpath.methods.topd.futures import horizon
from onpath.records import Guidance, Prompt, Rollout, Sampling

VALUES = {
    "reverse_kl": [0.1, 3.0, 0.2, 2.0, 0.4, 1.0],
    "student_logp": [-0.1, -3.0, -0.1, -0.2, -0.5, -0.1],
    "teacher_logp": [-0.2, -2.0, -0.3, -4.0, -0.5, -5.0],
}


def options(**changes: Any) -> TOPDOptions:
    return TOPDOptions(**{"window": 4, "decide": "quantile", **changes})


def chosen(**changes: Any) -> list[int]:
    found = candidates.select(VALUES, row=0, count=3, key="k", options=options(**changes), seed=0)
    return [f.position for f in found if f.decision != "reference"]


def fork(position: int, **known: Any) -> Fork:
    return Fork(**{"row": 0, "position": position, "loss": 1.0, "gap": 0.0, "draw": 0.5, **known})


def rollout(length: int, reason: Any = "stop") -> Rollout:
    return Rollout(
        prompt=Prompt(id="p", text="?"), ids=tuple(range(length)), logprobs=(0.0,) * length,
        finish_reason=reason, policy_version=0, sampling=Sampling(), context=(1,),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, [1, 3, 5]),  # 3.0, 2.0, 1.0
        ({"candidates": "teacher_nll"}, [1, 3, 5]),  # 2, 4, 5
        ({"candidates": "sampled_gap"}, [2, 3, 5]),  # gaps 0.1 −1 0.2 3.8 0 4.9
        ({"min_gap": 3}, [1, 5]),  # 3 is too close to 1; 5 is just far enough
    ],
)
def test_candidates(changes: dict[str, Any], positions: list[int]) -> None:
    assert chosen(**changes) == positions


@pytest.mark.parametrize("decide", ["quantile", "random_positions", "upper_quartile_of_low_loss"])
def test_what_is_settled_is_no_candidate_and_takes_no_ones_place(decide: Any) -> None:
    told = {"row": 0, "count": 1, "key": "k", "options": options(decide=decide), "seed": 0}
    found = candidates.select(VALUES, **told, start=4)
    assert len([f for f in found if f.decision != "reference"]) == 1
    assert all(f.position >= 4 for f in found)
    if decide != "random_positions":
        assert 5 in [f.position for f in found]  # 1.0, the loudest of the last two


def test_random_positions_are_a_function_of_the_seed_and_the_rollout() -> None:
    def draw(key: str, seed: int) -> list[int]:
        changed = options(decide="random_positions")
        return [
            f.position for f in candidates.select(VALUES, row=0, count=2, key=key, options=changed, seed=seed)
        ]

    assert draw("a", 0) == draw("a", 0)
    assert len({tuple(draw(key, seed)) for key in "abcdef" for seed in range(4)}) > 5


def test_references_come_from_the_lower_half_of_the_losses() -> None:
    found = candidates.select(
        VALUES, row=0, count=2, key="k", options=options(decide="upper_quartile_of_low_loss"), seed=0
    )
    assert {f.position for f in found if f.decision == "reference"} <= {0, 2, 4}
    assert sum(f.decision == "reference" for f in found) == 2


def test_the_loss_the_gap_and_the_cap_of_a_candidate() -> None:
    first = candidates.select(VALUES, row=7, count=1, key="k", options=options(), seed=0)[0]
    assert (first.row, first.position, first.loss, first.gap) == (7, 1, 3.0, -1.0)
    assert first.cap == pytest.approx(0.7 / 3.0)  # the median of 0.1 0.2 0.4 1 2 3 is 0.7
    ranked = candidates.select(
        VALUES, row=7, count=3, key="k", options=options(candidates="teacher_nll"), seed=0
    )
    assert ranked[0].position == first.position
    assert ranked[0].loss != first.loss
    assert ranked[0].cap == first.cap, "of the reverse KL, whatever ranks"


def test_counts_come_from_lengths_alone() -> None:
    assert candidates.candidate_counts([10, 100, 1000, 0], TOPDOptions()) == [1, 2, 23, 0]  # 2.25%, rounded
    assert candidates.candidate_counts([1000], TOPDOptions(max_per_rollout=5)) == [5]
    assert candidates.candidate_counts([200, 400], TOPDOptions(top_share=0.1, max_per_step=30)) == [10, 20]
    assert candidates.candidate_counts([9688]) == [218], "the paper's, without a cap"
    assert candidates.candidate_counts([200, 400], TOPDOptions(top_share=0.5)) == [100, 200]
    assert candidates.uncapped_counts([200, 400], TOPDOptions(top_share=0.5, max_per_step=3)) == [100, 200]


@pytest.mark.parametrize(
    ("lengths", "cap", "in_all"),
    [([40] * 64, 63, 63), ([40] * 64, 5, 5), ([40, 40, 40, 400], 11, 11), ([4444], 29, 29), ([40, 0], 3, 1)],
)
def test_a_cap_is_used_up(lengths: list[int], cap: int, in_all: int) -> None:
    """Equal shares in whole numbers, and what is left of the cap by lot: short responses do not lose all."""
    options = TOPDOptions(max_per_step=cap)
    keys = [f"k{i}" for i in range(len(lengths))]
    counts = candidates.candidate_counts(lengths, options, keys=keys, seed=3)
    wanted = candidates.uncapped_counts(lengths, options)
    assert sum(counts) == in_all
    share = min(1.0, cap / sum(wanted))
    assert all(abs(n - share * most) < 1 for n, most in zip(counts, wanted, strict=True))
    back = candidates.candidate_counts(lengths[::-1], options, keys=keys[::-1], seed=3)
    assert back[::-1] == counts, "a lot is a rollout's own, wherever it stands"


@pytest.mark.parametrize(("reason", "size"), [("stop", 4), ("length", 3)])
def test_a_window_ends_where_a_rollout_ran_out_of_room(reason: str, size: int) -> None:
    assert horizon(rollout(10, reason), 7, 4) == size


def test_quantile_drops_the_lowest_share() -> None:
    distances = [0.5, 0.1, 0.2, 0.9, 0.8, 0.3, 0.7, 0.6, 0.4, 1.0]
    found = [fork(10 * i, distance=d) for i, d in enumerate(distances)]
    threshold = decide.quantile_of(found, options())
    assert threshold == pytest.approx(0.37)  # numpy's linear quantile of 0.1 … 1.0 at 0.3
    kept = [f.distance for f in decide.decided(found, options(), threshold or 0.0) if f.decision == "fork"]
    assert sorted(kept) == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


@pytest.mark.parametrize("rule", [{"decide": "quantile"}, {"decide": "threshold", "threshold": 0.6}])
def test_without_loss_there_is_no_fork_however_far_the_windows(rule: dict[str, Any]) -> None:
    """A greedy window differs from a sampled rollout even where the two models are one."""
    found = [fork(i, distance=0.9, loss=loss) for i, loss in enumerate((0.0, 1e-7, 1e-3))]
    kept = [f.position for f in decide.decided(found, options(**rule), 0.5) if f.decision == "fork"]
    assert kept == [2]


@pytest.mark.parametrize("rule", [{}, {"decide": "threshold", "threshold": 0.0}])
def test_identical_futures_are_no_fork_whatever_the_rule(rule: dict[str, Any]) -> None:
    found = [fork(i, distance=0.0) for i in range(9)] + [fork(20, distance=0.5)]
    decided = decide.decided(found, options(**rule), decide.quantile_of(found, options(**rule)) or 0.0)
    assert [f.position for f in decided if f.decision == "fork"] == [20]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decide": "threshold", "threshold": 0.6}, [1, 2]),
        ({"decide": "sampled_gap"}, [0, 2]),  # gaps 5, 1, 9: the 0.3-quantile is 3.4
        ({"decide": "random_positions"}, [0, 1]),  # draws 0.9, 0.4, 0.1 against 0.3
        ({"decide": "all_high_loss"}, [0, 1, 2]),
        ({"decide": "quantile"}, [1, 2]),  # distances 0.1, 0.7, 0.6: 0.4
    ],
)
def test_rules(changes: dict[str, Any], expected: list[int]) -> None:
    found = [
        fork(0, distance=0.1, gap=5.0, draw=0.9),
        fork(1, distance=0.7, gap=1.0, draw=0.4),
        fork(2, distance=0.6, gap=9.0, draw=0.1),
    ]
    rules = options(**changes)
    decided = decide.decided(found, rules, decide.quantile_of(found, rules) or 0.0)
    assert [f.position for f in decided if f.decision == "fork"] == expected


def test_the_papers_rule_compares_with_low_loss_positions() -> None:
    rules = options(decide="upper_quartile_of_low_loss")
    low = [fork(i, distance=d, decision="reference") for i, d in enumerate([0.0, 0.1, 0.2, 0.3, 0.4])]
    found = [*low, fork(10, distance=0.29), fork(11, distance=0.31)]
    threshold = decide.quantile_of(found, rules)
    assert threshold == pytest.approx(0.3)
    decided = decide.decided(found, rules, threshold or 0.0)
    assert [(f.position, f.decision) for f in decided[5:]] == [(10, "surface"), (11, "fork")]
    assert all(f.decision == "reference" for f in decided[:5])


def test_forks_that_are_close_yield_to_the_farther_future() -> None:
    found = [fork(0, distance=0.5), fork(1, distance=0.9), fork(3, distance=0.6), fork(9, distance=0.4)]
    rules = options(overlap="suppress", decide="threshold", threshold=0.1)
    decisions = [f.decision for f in decide.decided(found, rules, 0.0)]
    assert decisions == ["too_close", "fork", "fork", "fork"]  # K/2 = 2: 1 and 3 are far enough apart
    other_row = [found[1], replace(found[0], row=1)]
    assert {f.decision for f in decide.decided(other_row, rules, 0.0)} == {"fork"}


def test_suppression_caps_the_surface_or_as_many_others() -> None:
    found = [
        fork(0, decision="surface", cap=0.2),
        fork(1, decision="fork", cap=0.3, draw=0.9),
        fork(2, decision="fork", cap=0.4, draw=0.1),
        fork(3, decision="reference", cap=0.5),
    ]
    weights = {
        name: [f.weight for f in decide.suppressed(found, options(suppress=name))]
        for name in ("none", "low", "high")
    }
    assert weights == {"none": [1, 1, 1, 1], "low": [0.2, 1, 1, 1], "high": [1, 1, 0.4, 1]}
    nothing_else = decide.suppressed(found[:1], options(suppress="high"))
    assert [f.weight for f in nothing_else] == [1]


PLAN = np.array([[0.1, 0.3, 0.1], [0.2, 0.0, 0.3]])  # rows of mass 1/2


def guidance(found: list[Fork], plans: list[Any], lengths: list[int], **changes: Any) -> Any:
    return guide.guidance_of(found, plans, lengths, options(**{"mass": "row", **changes}))


def test_targets_by_hand() -> None:
    """The teacher's window says 7 8 7, so the first and the third column are the same token."""
    f = fork(2, student=(4, 5), teacher=(7, 8, 7))
    row = guidance([f], [PLAN], [9])[0]
    assert row == (Guidance(start=2, targets=(pytest.approx({7: 0.4, 8: 0.6}), pytest.approx({7: 1.0}))),)
    literal = guidance([f], [PLAN], [9], mass="literal")[0][0].targets
    assert literal == (pytest.approx({7: 0.2, 8: 0.3}), pytest.approx({7: 0.5}))


def test_a_window_is_cut_at_the_end_of_what_is_trained() -> None:
    f = fork(2, student=(4, 5), teacher=(7, 8, 7))
    assert len(guidance([f], [PLAN], [3])[0][0].targets) == 1
    assert guidance([f], [PLAN], [2]) == {}


def test_overlapping_targets_are_averaged() -> None:
    a = fork(2, student=(4, 5), teacher=(7, 8, 7))
    b = fork(3, student=(5, 6), teacher=(9,))
    found = guidance([a, b], [PLAN, np.array([[0.5], [0.5]])], [9], overlap="average")[0]
    assert [g.start for g in found] == [2]
    assert found[0].targets[1] == pytest.approx({7: 0.5, 9: 0.5})  # of {7: 1} and {9: 1}
    assert found[0].targets[2] == pytest.approx({9: 1.0})


def test_guidance_with_a_gap_is_two_records_and_rows_stay_apart() -> None:
    f = fork(0, student=(4,), teacher=(7,))
    one = np.array([[1.0]])
    found = guidance([f, replace(f, position=5), replace(f, row=1)], [one] * 3, [9, 9])
    assert [g.start for g in found[0]] == [0, 5]
    assert [g.start for g in found[1]] == [0]


def test_controls_of_the_plan() -> None:
    f = fork(0, student=(4, 5), teacher=(7, 8, 9))
    positional = guide.controlled(PLAN, f, options(plan="positional"), 0)
    assert positional.tolist() == [[0.5, 0, 0], [0, 0.5, 0]]
    assert guide.controlled(PLAN, f, options(), 0) is PLAN
    moved = [guide.controlled(PLAN, f, options(plan="shuffled"), seed) for seed in range(8)]
    assert len({str(m) for m in moved}) > 2
    for m in moved:  # columns trade places, all rows together
        assert sorted(map(tuple, m.T)) == sorted(map(tuple, PLAN.T))


def test_positional_targets_beyond_the_teachers_end_are_no_targets() -> None:
    f = fork(1, student=(4, 5, 6), teacher=(7, 8))
    plan = guide.controlled(np.full((3, 2), 1 / 6), f, options(plan="positional"), 0)
    assert guidance([f], [plan], [9], plan="positional")[0][0].targets == ({7: 1.0}, {8: 1.0})


def test_a_recorded_fork_is_json_and_keeps_large_entries() -> None:
    f = fork(2, student=(4, 5), teacher=(7, 8, 7), distance=0.25, decision="fork")
    found = guide.described(f, PLAN, None, lambda ids: [f"<{i}>" for i in ids], 0.5)
    assert json.loads(json.dumps(found)) == found
    assert found["plan"] == [[0, 1, 0.6], [1, 2, 0.6]]
    assert found["teacher_text"] == "<7><8><7>"
    assert found["student_window"] == [4, 5]
    assert (found["position"], found["distance"], found["decision"]) == (2, 0.25, "fork")
    assert guide.described(f, None, None, lambda ids: [""] * len(ids), 0.5)["plan"] == []


def test_counts_are_sums() -> None:
    found = [
        fork(0, distance=0.5, decision="fork", generated=(0, 2)),
        fork(1, distance=0.0, decision="surface", generated=(3, 1), weight=0.5),
        fork(2, distance=9.0, decision="reference", generated=(0, 1)),
    ]
    counted = guide.counted(found, [])
    assert counted["totals"] == {
        "fork_candidates": 2, "forks": 1, "suppressed_tokens": 1, "guided_tokens": 0,
        "student_tokens_generated": 3, "teacher_tokens_generated": 4,
    }  # fmt: skip
    assert counted["means"]["fork_share"] == (1, 2)
    assert counted["means"]["candidate_distance"] == (0.5, 2)
    assert counted["means"]["identical_share"] == (1, 2)
