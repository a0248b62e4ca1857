"""Two gloo processes give what one process gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onpath.config.build import with_own
from onpath.config.whole import Config
from onpath.methods import Edit, Method, MethodOptions, Prepared, own_response
from onpath.methods.tools import Tools
from onpath.records import Rollout
from onpath.run.log import read_lines
from onpath.system import distributed
from onpath.system.draws import request_seed
from onpath.training import train
from tests.engines.test_server import fake_of, restarted
from tests.forks import TIMEOUT, done_by_two, forked

COLUMNS = ("loss", "tokens", "reverse_kl_nats", "student_entropy_nats", "grad_norm", "mean_length", "lr")


def in_ranks(config: Config, tmp_path: Path, *, processes: int) -> Path:
    """The run's directory, by so many ranks, without a launcher."""
    ended = forked(lambda _: train(config, quiet=True), tmp_path, world=processes)
    assert [code for code, _, _ in ended] == [0] * processes, "\n".join(err for _, _, err in ended)
    return Path(config.run.dir) / config.run.name


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [7, 1])  # an odd share; a rank that has nothing to do
def test_two_processes_are_one(prompts: int, tiny: Callable[..., Config], tmp_path: Path) -> None:
    options = {"rollout__prompts": prompts, "optim__steps": 3, "eval__start": True}
    one = train(tiny(**options, run__name="one"), quiet=True).directory
    two = in_ranks(tiny(**options, run__name="two"), tmp_path, processes=2)
    assert_same(one, two)


@pytest.mark.slow
def test_processes_agree_on_verdicts_that_are_not_the_same_twice(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """One finds a new best, the other would not: both save, and both know what was found."""

    def of_the_first(text: str, answer: str) -> bool:
        return distributed.rank() == 0

    config = tiny(eval__every=1, run__keep_best="test", run__stop_after=1, parallel__timeout=TIMEOUT)

    def run(rank: int) -> None:
        train(config, grader=of_the_first, quiet=True)

    done_by_two(run, tmp_path)
    lines = read_lines(Path(config.run.dir) / config.run.name / "eval.jsonl")
    assert {0 < line["avg_at_k"] < 1 for line in lines} == {True}


class LongestOfPrompt(Method):
    """Of the samples of a prompt the longest is trained on."""

    compares_samples = True

    class Options(MethodOptions):
        """None."""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        kept: dict[str, Rollout] = {}
        for r in rollouts:
            best = kept.setdefault(r.prompt.id, r)
            kept[r.prompt.id] = r if len(r.ids) > len(best.ids) else best
        chosen = {r.key for r in kept.values()}
        out = Edit(kind="none", kept=False, reason="shorter")
        made = [own_response(r) for r in rollouts]
        return Prepared(
            trajectories=[
                t if r.key in chosen else replace(t, edit=out) for t, r in zip(made, rollouts, strict=True)
            ],
            totals={"chosen": len(kept)},
        )


@pytest.mark.slow
def test_samples_that_are_compared_stay_together(tiny: Callable[..., Config], tmp_path: Path) -> None:
    options = {"rollout__prompts": 5, "rollout__n": 3, "optim__steps": 3}
    configs = [with_own(tiny(**options, run__name=name), method=LongestOfPrompt) for name in ("one", "two")]
    one = train(configs[0], quiet=True).directory
    two = in_ranks(configs[1], tmp_path, processes=2)
    assert_same(one, two)
    assert [row["chosen"] for row in read_lines(two / "metrics.jsonl")] == [5] * 3


class Remembering(Method):
    """Counts the tokens that it has seen: of its own process, or of all."""

    class Options(MethodOptions):
        everybodys: bool = True
        """Whether of all."""

    def __init__(self, options: Any, tools: Tools) -> None:
        super().__init__(options, tools)
        self.seen = torch.zeros(())

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        mine = [len(r.ids) for r in rollouts]
        self.seen += sum(self.tools.gather(mine) if self.options.everybodys else mine)
        return Prepared(trajectories=[own_response(r) for r in rollouts], metrics={"seen": float(self.seen)})

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"seen": self.seen}


@pytest.mark.slow
@pytest.mark.parametrize("everybodys", [True, False])
def test_what_a_method_keeps_is_the_same_everywhere(
    everybodys: bool, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny(rollout__prompts=5, optim__steps=2, run__save_every=1, data__eval={})
    config = with_own(config, method=Remembering.Options(everybodys=everybodys))
    ended = forked(lambda _: train(config, quiet=True), tmp_path, world=2)
    if everybodys:
        assert [code for code, _, _ in ended] == [0, 0], ended
        rows = read_lines(Path(config.run.dir) / config.run.name / "metrics.jsonl")
        assert rows[1]["seen"] > rows[0]["seen"] == rows[0]["tokens"]
    else:
        assert all("its state() differs from process to process" in err for _, _, err in ended), ended


@pytest.mark.slow
@pytest.mark.parametrize(("servers", "overlap"), [(2, False), (1, True)])
def test_two_processes_share_rollout_servers(
    servers: int, overlap: bool, tiny: Callable[..., Config], model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """New weights go to each once for both, and not before the second has its samples of the old ones."""
    fakes = [fake_of(model_dirs["student"]) for _ in range(servers)]
    urls = [fake.url for fake in fakes]
    options = {"rollout__engine": "vllm", "rollout__url": urls, "rollout__overlap": overlap}
    options |= {"rollout__prompts": 2, "optim__steps": 3, "optim__lr": 0.01, "eval__start": True}
    ones = [tiny(**options, run__name=name) for name in ("one", "two")]
    late = {request_seed(ones[0].run.seed, f"step {step}/1/0") for step in range(3)}  # of the second process
    for fake in fakes:
        fake.waits_for_push = lambda body: body.get("seed") in late
    one = train(ones[0], quiet=True).directory
    pushes = [fake.resets for fake in fakes]
    asked = {body.get("seed") for fake in fakes for body in fake.requests}
    for fake in fakes:
        restarted(fake)
    two = in_ranks(ones[1], tmp_path, processes=2)
    for fake in fakes:
        fake.stop()
    assert late <= asked
    assert_same(one, two)
    assert pushes == [1 + 3] * servers
    assert [fake.resets for fake in fakes] == [2 * (1 + 3)] * servers


def assert_same(one: Path, two: Path) -> None:
    """Metrics, evaluations and weights of two runs."""
    rows = [read_lines(run / "metrics.jsonl") for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    for a, b in zip(*rows, strict=True):
        assert {k: a[k] for k in COLUMNS} == pytest.approx({k: b[k] for k in COLUMNS}, rel=1e-5, abs=1e-7)
    evals = [read_lines(run / "eval.jsonl") for run in (one, two)]
    assert evals[0] == evals[1]
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    for name, tensor in weights[0].items():
        assert tensor.allclose(weights[1][name], rtol=1e-4, atol=2e-6), name
