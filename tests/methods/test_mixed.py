"""Responses that several write: where they end, and what they cost."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onpath.config.whole import Config
from onpath.engines.hf import HFEngine
from onpath.records import Trajectory
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.trajectories import read_rows, trajectory_files
from onpath.system.code import allowed
from onpath.system.errors import UserError
from onpath.training import Stopwatch, corrected, train
from tests.methods.family import options_of, prepared

Tiny = Callable[..., Config]
NEAR = {"window": 6, "distance": 0.0}
STOPS: dict[str, tuple[dict[str, Any], int]] = {
    "branch": ({"failed_only": False}, 1),
    "bridge": ({**NEAR, "failed_only": False, "keep": "all", "every": 2, "meet_window": 2}, 1),
    "relay": ({"delta": 1.0}, 2),
}
"""Method → options, and characters of a stop string, the last of which somebody else may write."""


def boundaries(trajectories: list[Trajectory], text: Callable[[Any], str], size: int) -> Counter[str]:
    """Texts of so many tokens that begin with one of the student's or are not the student's."""
    found: Counter[str] = Counter()
    for t in trajectories:
        for i in range(len(t.response) - size):
            if len(set(t.written_by[i : i + size]) | {"student"}) > 1:
                found[text(t.response[i : i + size])] += 1
    return Counter({said: n for said, n in found.items() if len(said) == size})


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_string_ends_a_response_whoever_completes_it(name: str, tiny: Tiny) -> None:
    method, size = STOPS[name]
    options = {**options_of({"name": name, **method}), "rollout__prompts": 12, "data__eval": {}}
    parts = assemble(tiny(**options))
    text = parts.text.renderer.text
    ((stop, _),) = boundaries(prepared(parts).trajectories, text, size).most_common(1)
    made = prepared(assemble(tiny(**options, rollout__stop=[stop]))).trajectories
    said = [text(t.response) for t in made]
    assert any(stop in text(t.response) and len(set(t.written_by)) > 1 for t in made)
    assert all(stop not in s[:-1] for s in said)


COSTS: dict[str, dict[str, Any]] = {
    "relay": {"trigger": "fork", "window": 6, "distance": 0.05, "legs": 1, "control": "own_token"},
    "topd": {"window": 6, "top_share": 0.3, "student_window": "regenerate"},
    "bridge": {"window": 6, "distance": 0.05},
}


@pytest.mark.parametrize("name", COSTS)
def test_all_that_a_window_takes_is_counted(name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is cut off afterwards, and what is only looked at."""
    parts = assemble(tiny(**options_of({"name": name, **COSTS[name]}), data__eval={}))
    generated: Counter[bool] = Counter()
    for call in ("continue_from", "draw_from"):
        real = getattr(HFEngine, call)

        def counting(self: HFEngine, *args: Any, real: Any = real, **named: Any) -> Any:
            done = real(self, *args, **named)
            generated[self.model is parts.models.student] += sum(len(c.ids) for c in done)
            return done

        monkeypatch.setattr(HFEngine, call, counting)
    row = corrected(parts, 0, Stopwatch()).row(parts.models.device)
    assert row["teacher_tokens_generated"] == generated[False] > 0
    if name == "topd":
        assert row["student_tokens_generated"] == generated[True]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "topd", "window": 6},
        {"name": "bridge", "window": 6},
        {"name": "relay", "hold": 5},
        {"name": "truncate", "stop_when": "fork", "window": 6},
    ],
)
def test_windows_must_fit_behind_the_last_token(
    method: dict[str, Any], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, not when a place near an end is found."""
    longest = 12 + max(len(r.context) for r in prepared_opd(tiny))
    monkeypatch.setattr("onpath.run.inputs.context_length", lambda config: longest)
    options = {"rollout__max_new_tokens": 12, "data__eval": {}, "rollout__prompts": 40}
    assemble(tiny(**options))
    option = "hold" if method["name"] == "relay" else "window"
    with pytest.raises(UserError, match=rf"17 new ones .* or method\.{option}"):
        assemble(tiny(**options, **options_of(method)))


def prepared_opd(tiny: Tiny) -> list[Any]:
    parts = assemble(tiny(rollout__max_new_tokens=1, rollout__prompts=40, data__eval={}))
    return [t.origin for t in prepared(parts).trajectories]


@pytest.mark.parametrize("refresh", ["always", "never"])
def test_where_the_teacher_writes_the_student_draws_nothing(
    refresh: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's metrics, and what rewards keep, are of what is trained on."""
    (tmp_path / "own.py").write_text("def long(text):\n    return float(len(text) > 8)\n")
    options: dict[str, Any] = {
        "method__writer": "teacher",
        "rollout__refresh": refresh,
        "optim__steps": 1,
        "run__trajectories_every": 1,
        "rollout__prompts": 8,
    }
    with allowed():
        config = tiny(**options, rewards__long={"name": f"{tmp_path / 'own.py'}:long", "at_least": 1.0})
        (row,) = read_lines(train(config, quiet=True).directory / "metrics.jsonl")
    stored = list(read_rows(trajectory_files(Path(config.run.dir) / config.run.name)[0]))
    assert row["student_tokens_generated"] == 0
    assert row["teacher_tokens_generated"] == sum(len(r["response"]) for r in stored)
    assert row["tokens"] == sum(len(r["response"]) for r in stored if r["kept"]) > 0
    assert {r["kept"] for r in stored} == {True, False}
    for r in stored:
        assert r["origin_response"] == r["response"]
        assert r["kept"] == (r["long"] == 1.0) == (len(r["response_text"]) > 8)
        assert set(r["writers"]) <= {"teacher"}
    assert row["mean_length"] == pytest.approx(row["teacher_tokens_generated"] / len(stored))


@pytest.mark.parametrize(
    "method", [{"name": "trd"}, {"name": "opd", "writer": "teacher"}, {"name": "topd", "plan": "spliced"}]
)
def test_the_sampled_token_must_be_the_students(method: dict[str, Any], tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"divergence sampled .* use reverse_kl"):
        tiny(**options_of({**method, "divergence": "sampled"}))
