"""truncate: where training ends, against plain loops over full logits; its weights, its control, its cost."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from onpath import config as configuration
from onpath.config.methods.truncate import TruncateOptions
from onpath.engines.forward import Kept
from onpath.losses.topk import overlap
from onpath.methods import make_method
from onpath.methods.truncate import drifting
from onpath.records import Rollout, token_count
from onpath.run.loss import student_states, teacher_states
from onpath.system.errors import UserError
from onpath.training import sample
from tests.methods.family import Tiny, logps_along, parts_of, prepared


def lengths(tiny: Tiny, rollouts: Sequence[Rollout] | None = None, **options: Any) -> tuple[list[int], Any]:
    parts = parts_of(tiny, name="truncate", **options)
    rollouts = sample(parts, 0) if rollouts is None else rollouts
    done = parts.method.prepare(rollouts, step=0)
    for t, r in zip(done.trajectories, rollouts, strict=True):
        assert t.response == r.ids[: len(t.response)], "the first tokens of the rollout, as they are"
        assert (t.edit.kind == "truncate") is (len(t.response) < len(r.ids))
    return [len(t.response) for t in done.trajectories], (parts, rollouts, done)


def test_overlap_token_by_token(tiny: Tiny) -> None:
    found, (parts, _, done) = lengths(tiny, stop_when="overlap", window=4, overlap_k=12, overlap_below=0.26)
    expected = []
    for t in prepared(parts_of(tiny)).trajectories:
        sides = (logps_along(m, t) for m in (parts.models.student, parts.models.teacher.model))
        ours, theirs = (side.topk(12).indices.tolist() for side in sides)
        shared = [len({*a} & {*b}) / 12 for a, b in zip(ours, theirs, strict=True)]
        blocks = [shared[at : at + 4] for at in range(0, len(shared), 4)]
        drifted = [sum(b) / len(b) < 0.26 for b in blocks]
        expected.append(min(len(shared), 4 * (drifted.index(True) + 1) if any(drifted) else len(shared)))
    assert found == expected
    assert len({*found}) > 2, "or nothing is proved"
    assert token_count(done.trajectories) == sum(found)
    assert done.means["token_share"] == (sum(found), sum(len(r.ids) for r in sample(parts, 0)))


def test_low_kl_token_by_token(tiny: Tiny) -> None:
    options = {"window": 3, "patience": 2, "low_share": 0.6}
    found, (parts, _, _) = lengths(tiny, stop_when="low_kl", **options)
    means = []
    for t in prepared(parts_of(tiny)).trajectories:
        s, q = (logps_along(m, t) for m in (parts.models.student, parts.models.teacher.model))
        kl = (s.exp() * (s - q)).sum(-1)
        means.append([float(part.mean()) for part in kl.split(3)])
    low = float(torch.tensor([m for row in means for m in row]).double().quantile(0.6))
    whole = [len(r.ids) for r in sample(parts, 0)]
    expected = []
    for row, n in zip(means, whole, strict=True):
        starts = [i for i in range(len(row) - 1) if row[i] < low and row[i + 1] < low]
        expected.append(min(n, 3 * max(1, starts[0])) if starts else n)
    assert found == expected
    assert found != whole
    assert float(parts.method.state()["truncate.threshold"]) == pytest.approx(low, rel=1e-4)


def test_checker_keeps_the_first_wrong_token() -> None:
    """On the gym, whose checker labels every token."""
    from onpath.run.assemble import assemble

    config = configuration.build(
        {
            "student": {"device": "cpu"},
            "teacher": {"device": "cpu"},
            "method": {"name": "truncate", "stop_when": "checker"},
            "rollout": {"prompts": 12},
        }
    )
    parts = assemble(config)
    rollouts = sample(parts, 0)
    task, renderer = parts.text.task, parts.text.renderer
    assert task is not None
    wrong = 0
    for r, t in zip(rollouts, parts.method.prepare(rollouts, step=0).trajectories, strict=True):
        labels = task.labels(r.prompt.question, renderer.tokens(r.ids))
        assert "error" not in labels[: len(t.response) - 1]
        assert len(t.response) == len(r.ids) or labels[len(t.response) - 1] == "error"
        wrong += "error" in labels
    assert wrong > 0


def test_fork_ends_at_the_first_fork(tiny: Tiny) -> None:
    options = {"window": 6, "distance": 0.8}
    found, (_, rollouts, done) = lengths(tiny, stop_when="fork", **options)
    topd = parts_of(tiny, name="topd", window=6, decide="threshold", threshold=0.8)
    for n, r, t in zip(found, rollouts, prepared(topd).trajectories, strict=True):
        real = [f["position"] for f in t.edit.detail["forks"] if f["decision"] == "fork"]
        assert n == (min(real) + 1 if real else len(r.ids))
    assert done.totals["teacher_tokens_generated"] > 0
    assert 0 < done.means["truncated_share"][0] < len(found)


def test_a_share_of_each_response(tiny: Tiny) -> None:
    found, (_, rollouts, _) = lengths(tiny, stop_when="share", share=0.3)
    assert found == [max(1, round(0.3 * len(r.ids))) for r in rollouts]


def test_weights_fall_with_each_drift() -> None:
    options = TruncateOptions(window=2, overlap_below=0.5, decay=0.5, least_weight=0.3)
    shared = [1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert drifting(shared, options) == (1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5)
    assert drifting(shared, options.model_copy(update={"least_weight": 0.2})) == (
        *(1.0,) * 4,
        *(0.5,) * 4,
        0.25,
    )
    assert drifting(shared, options.model_copy(update={"decay": 0.0})) == (1.0,) * 4
    assert drifting([], options) == ()


@pytest.mark.parametrize(("k", "hits"), [(10, 9), (10, 7), (20, 14), (20, 7), (10, 3), (5, 3), (16, 8)])
def test_a_window_at_the_threshold_has_not_drifted(k: int, hits: int) -> None:
    """The share of hits is float32, which lies on either side of the decimal."""
    (share,) = overlap(torch.arange(k)[None], torch.arange(k)[None] + k - hits).tolist()
    options = TruncateOptions(window=4, overlap_below=hits / k, decay=0.0)
    assert drifting([share] * 12, options) == (1.0,) * 12
    fewer = [share] * 3 + [share - 1 / k]
    assert drifting([*fewer, *[1.0] * 8], options) == (1.0,) * 4


def test_lower_weights_stay_in_the_count(tiny: Tiny) -> None:
    options = {"stop_when": "overlap", "window": 4, "overlap_k": 12, "overlap_below": 0.26, "decay": 0.5}
    found, (_, _, done) = lengths(tiny, **options)
    assert {w for t in done.trajectories for w in t.token_weights} >= {1.0, 0.5}
    assert token_count(done.trajectories) == sum(found)


def test_the_control_cuts_the_same_rollouts_elsewhere(tiny: Tiny) -> None:
    options = {"stop_when": "overlap", "window": 4, "overlap_k": 12, "overlap_below": 0.26}
    by_rule, (_, rollouts, _) = lengths(tiny, **options)
    by_lot, (parts, _, _) = lengths(tiny, rollouts, control="random_place", **options)
    whole = [len(r.ids) for r in rollouts]
    cut = [i for i, (n, all_) in enumerate(zip(by_rule, whole, strict=True)) if n < all_]
    assert [by_lot[i] for i in cut] != [by_rule[i] for i in cut]
    assert all(by_lot[i] == whole[i] for i in range(len(whole)) if i not in cut)
    again = make_method(parts.config.method, parts.tools).prepare(rollouts, step=0)
    assert [len(t.response) for t in again.trajectories] == by_lot
    later = make_method(parts.config.method, parts.tools).prepare(rollouts, step=1)
    assert [len(t.response) for t in later.trajectories] != by_lot


def test_the_loss_reads_nothing_twice(tiny: Tiny) -> None:
    """Hidden states of the cut responses are those of the whole ones, and they are handed over."""
    from onpath.data.batch import collate

    _, (parts, _, done) = lengths(tiny, stop_when="share", share=0.5, window=4)
    parts = parts_of(tiny, name="truncate", stop_when="overlap", window=4, overlap_k=12, overlap_below=0.26)
    done = prepared(parts)
    batch = collate(done.trajectories)
    student, teacher = student_states(parts.models, batch, done), teacher_states(parts.models, batch, done)
    fresh = replace(done, kept=Kept())
    assert done.kept.student == [], "handed over"
    torch.testing.assert_close(student, student_states(parts.models, batch, fresh), rtol=1e-4, atol=1e-5)
    again = teacher_states(parts.models, batch, fresh)
    torch.testing.assert_close(teacher.hidden, again.hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"method": {"name": "truncate", "stop_when": "checker"}, "data": {"train": "x.jsonl"}},
            "use overlap",
        ),
        (
            {
                "method": {"name": "truncate", "support": "teacher_topk", "support_k": 8},
                "teacher": {"engine": "vllm", "url": "http://localhost:1"},
            },
            "raise that",
        ),
        ({"method": {"name": "truncate", "stop_when": "never"}}, "method.stop_when"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        configuration.build(changes)
