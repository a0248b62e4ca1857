"""What code of one's own may hand over: rollouts of other steps, counts by name, rewards without a name."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from onpath.config.build import with_own
from onpath.config.whole import Config
from onpath.engines.base import Engine
from onpath.methods import Method, MethodOptions, Prepared, own_response
from onpath.methods.opd import OPD
from onpath.methods.tools import Text
from onpath.records import Completion, Rollout, Sampling
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.system.code import allowed
from onpath.system.errors import UserError
from onpath.training import sample, train
from tests.system.test_two_processes import in_ranks

Tiny = Callable[..., Config]


class Buffer(Method):
    """Trains on the rollouts of the step before."""

    class Options(MethodOptions):
        pass

    def __init__(self, options: Any, tools: Any) -> None:
        super().__init__(options, tools)
        self.old: list[Rollout] = []

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        used, self.old = self.old or list(rollouts), list(rollouts)
        return Prepared(trajectories=[own_response(r) for r in used])


def test_rollouts_of_other_steps_have_their_own_rewards(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def length(text):\n    return float(len(text))\n")
    reward = {"len": {"name": f"{tmp_path / 'own.py'}:length", "at_least": 15.0}}
    options = {"rollout__max_new_tokens": 16, "run__trajectories_every": 1, "data__eval": {}}
    with allowed():
        config = tiny(**options, **{f"rewards__{k}": v for k, v in reward.items()})
        result = train(config, method=Buffer, quiet=True)
    rows = pq.read_table(result.directory / "trajectories" / "step_000002.parquet").to_pylist()
    assert len({row["len"] for row in rows}) > 1
    for row in rows:
        assert row["len"] == len(row["origin_text"])
        assert row["kept"] is (row["len"] >= 15)


@pytest.mark.parametrize("known", [True, False])
def test_a_step_says_how_much_stands_behind_first_errors(
    known: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all rollouts' tokens; nothing where the task cannot tell."""

    def third(text: Text, rollout: Rollout) -> int | None:
        return 3 if known and len(rollout.ids) > 3 else None

    monkeypatch.setattr(Text, "first_wrong_token", third)
    monkeypatch.setattr(Text, "tells_errors", known)
    run = train(tiny(data__eval={}, optim__steps=1, run__trajectories_every=1), quiet=True).directory
    (row,) = read_lines(run / "metrics.jsonl")
    stored = pq.read_table(run / "trajectories" / "step_000001.parquet").to_pylist()
    lengths = [len(r["origin_response"]) for r in stored]
    behind = sum(n - 4 for n in lengths if n > 3) / sum(lengths)
    assert row.get("tokens_behind_error") == (pytest.approx(behind) if known else None)


@pytest.mark.slow
def test_two_processes_store_rollouts_of_other_steps(tiny: Tiny, tmp_path: Path) -> None:
    config = with_own(tiny(run__trajectories_every=1, data__eval={}, parallel__balance=False), method=Buffer)
    directory = in_ranks(config, tmp_path, processes=2)
    rows = pq.read_table(directory / "trajectories" / "step_000002.parquet").to_pylist()
    assert len(rows) == 8


class Counting(Method):
    """Each process says what it has met, in an order of its own."""

    class Options(MethodOptions):
        pass

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        means, totals = {"short": (10.0, 1.0), "long": (1000.0, 1.0)}, {"seen": 3}
        if os.environ.get("RANK") == "1":
            means, totals = {**dict(reversed(means.items())), "rare": (7.0, 1.0)}, {"more": 2, "seen": 1}
        return Prepared(trajectories=[own_response(r) for r in rollouts], means=means, totals=totals)


@pytest.mark.slow
def test_counts_are_summed_by_name(tiny: Tiny, tmp_path: Path) -> None:
    directory = in_ranks(with_own(tiny(data__eval={}), method=Counting), tmp_path, processes=2)
    for row in read_lines(directory / "metrics.jsonl"):
        found = {k: row[k] for k in ("short", "long", "rare", "seen", "more")}
        assert found == {"short": 10.0, "long": 1000.0, "rare": 7.0, "seen": 4, "more": 2}


class Child(Buffer):
    """Inherits options, and is not its parent."""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        return Prepared(trajectories=[own_response(r, length=1) for r in rollouts])


class Shorter(OPD):
    """A built-in method with an option more."""

    class Options(OPD.Options):
        most: int = 2

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        return Prepared(trajectories=[own_response(r, length=self.options.most) for r in rollouts])


class Plain(OPD):
    """A built-in method with its options."""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        return Prepared(trajectories=[own_response(r, length=3) for r in rollouts])


class Bare(Method):
    """Without options."""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        return Prepared(trajectories=[own_response(r, length=4) for r in rollouts])


@pytest.mark.parametrize(("method", "most"), [(Child, 1), (Shorter, 2), (Plain, 3), (Bare, 4)])
def test_a_method_that_inherits_is_itself(method: type[Method], most: int, tiny: Tiny) -> None:
    result = train(tiny(data__eval={}, optim__steps=1), method=method, quiet=True)
    assert f":{method.__name__}" in (result.directory / "config.yaml").read_text()
    (row,) = read_lines(result.directory / "metrics.jsonl")
    assert row["tokens"] == 8 * most
    assert type(assemble(tiny()).method) is OPD


def test_rewards_without_a_name_are_told_apart(tiny: Tiny) -> None:
    def always(value: float) -> Callable[[str], float]:
        def reward(text: str) -> float:
            return value

        return reward

    rewards = {"one": lambda text: 1.0, "two": lambda text: 2.0, "four": always(4.0), "eight": always(8.0)}
    result = train(tiny(data__eval={}, optim__steps=1), rewards=rewards, quiet=True)
    (row,) = read_lines(result.directory / "metrics.jsonl")
    assert {k: row[k] for k in rewards} == {"one": 1.0, "two": 2.0, "four": 4.0, "eight": 8.0}
    assert row["reward"] == 15.0


class Dropping(Engine):
    """Loses its last answer."""

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        return [Completion(ids=(5, 2), logprobs=(-1.0, -1.0), finish_reason="stop") for _ in prefixes[1:]]


def test_an_engine_that_loses_an_answer_does_not_train(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"engine Dropping: gave 7 completions where 8"):
        sample(assemble(tiny(), engine=Dropping()), 0)
