"""vLLM in this process gives its memory back between phases, and each process of several has its own: the
calls and their order, noted by a stand-in. (The CPU build does not sleep; tests/vllm has what it does.)"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from torch.distributed import is_initialized

from onpath.commands.doctor.command import diagnose
from onpath.commands.probes.command import run_named
from onpath.config.whole import Config
from onpath.engines.hf import HFEngine
from onpath.engines.worlds import SpoilingEngine
from onpath.methods import Method, MethodOptions, Prepared
from onpath.methods.base import own_response
from onpath.records import Rollout, Sampling
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.training import train
from tests.engines.test_server import fake_of
from tests.forks import TIMEOUT, done_by_all, forked
from tests.system.test_two_processes import COLUMNS

Tiny = Callable[..., Config]


class Recorder:
    """A `vllm.LLM` over an engine of ours; its calls in their order."""

    engine: HFEngine
    calls: ClassVar[list[str]] = []
    asked: ClassVar[list[Any]] = []
    settings: dict[str, Any]

    def __init__(self, **settings: Any) -> None:
        type(self).settings, self.asleep = settings, False
        core = SimpleNamespace(shutdown=lambda: self.calls.append(f"shutdown in group: {is_initialized()}"))
        self.llm_engine = SimpleNamespace(engine_core=core)

    def generate(self, prompts: Sequence[Any], params: Sequence[Any], *, use_tqdm: bool) -> list[Any]:
        assert not self.asleep
        self.asked.append([p["prompt_token_ids"] for p in prompts])
        self.calls.append("score" if hasattr(params[0], "prompt_logprobs") else "write")
        return [self._one(p["prompt_token_ids"], asked) for p, asked in zip(prompts, params, strict=True)]

    def _one(self, ids: list[int], asked: Any) -> Any:
        if hasattr(asked, "prompt_logprobs"):
            (row,) = self.engine.score([ids[:1]], [ids[1:]])
            entries = [{t: SimpleNamespace(logprob=p)} for t, p in zip(ids[1:], row, strict=True)]
            return SimpleNamespace(prompt_logprobs=[None, *entries])
        sampling = Sampling(max_new_tokens=asked.max_tokens, seed=asked.seed)
        (c,) = self.engine.continue_from([ids], sampling)
        entries = [{t: SimpleNamespace(logprob=p)} for t, p in zip(c.ids, c.logprobs, strict=True)]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=c.ids, logprobs=entries)])

    def collective_rpc(self, name: str, kwargs: Any) -> None:
        assert not self.asleep
        self.calls.append("load")
        self.engine.model.load_state_dict(dict(kwargs["weights_iterator"]), strict=False)

    def reset_prefix_cache(self) -> None:
        pass

    def sleep(self, level: int) -> None:
        assert not self.asleep
        assert level == 1
        self.asleep = True
        self.calls.append("sleep")

    def wake_up(self) -> None:
        assert self.asleep
        self.asleep = False
        self.calls.append("wake")


@pytest.fixture
def library(model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    fake = fake_of(model_dirs["student"])
    fake.stop()
    module = ModuleType("vllm")
    monkeypatch.setattr(Recorder, "engine", fake.engine, raising=False)
    monkeypatch.setattr(Recorder, "calls", [], raising=False)
    monkeypatch.setattr(Recorder, "asked", [], raising=False)
    monkeypatch.setattr(module, "LLM", lambda model, **settings: Recorder(**settings), raising=False)
    monkeypatch.setattr(module, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return Recorder


@pytest.mark.parametrize("fails", [False, True])
def test_a_copy_that_it_starts_from_goes(
    fails: bool, tiny: Tiny, library: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def start(model: str, **settings: Any) -> Recorder:
        seen.append(Path(model))
        assert (seen[0] / "config.json").is_file()
        if fails:
            raise RuntimeError("no room")
        return library(**settings)

    monkeypatch.setattr(sys.modules["vllm"], "LLM", start, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = tiny(rollout__engine="vllm", student__lora_rank=2, student__lora_targets=["lm_head"])
    with pytest.raises(UserError, match="no room") if fails else nullcontext():
        assemble(config)
    assert [place.parent for place in seen] == [tmp_path]
    assert not seen[0].exists()


@pytest.mark.parametrize("sleeps", [True, False])
def test_it_sleeps_while_the_student_trains(sleeps: bool, tiny: Tiny, library: type[Recorder]) -> None:
    options = {"enable_sleep_mode": True} if sleeps else {}
    config = tiny(rollout__engine="vllm", rollout__vllm=options, optim__steps=2, eval__start=False)
    result = train(config, quiet=True)
    assert len(read_lines(result.directory / "metrics.jsonl")) == 2
    calls = library.calls
    assert calls.pop() == "shutdown in group: False", "not when it happens to be collected"
    if not sleeps:
        assert not {"sleep", "wake"} & set(calls)
        return
    for i, call in enumerate(calls):
        if call == "write":
            assert calls[i + 1] == "sleep", "memory is free as soon as the samples are there"
        if call == "load":
            assert calls[i + 1] == "score", "the check after a push does not send it to sleep"
    assert calls.count("sleep") == calls.count("write")


def test_who_only_looks_ends_it_too(tiny: Tiny, library: type[Recorder], tmp_path: Path) -> None:
    """A doctor's or a probe's would keep its memory from the run that a notebook starts next."""
    config = tiny(rollout__engine="vllm", rollout__prompts=2, data__limit=4)
    (file := tmp_path / "config.yaml").write_text(config.to_yaml())
    for look in (lambda: list(diagnose(config)), lambda: run_named("divergence", file, rollouts=2)):
        library.calls.clear()
        look()
        assert [call for call in library.calls if "shutdown" in call] == ["shutdown in group: False"]
        distributed.stop()
        assert library.calls[-1] == "shutdown in group: False", "once"


def test_what_fails_behind_it_ends_it(
    tiny: Tiny, library: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise UserError("a prompt cannot be used")

    monkeypatch.setattr(Method, "check", refused)
    with pytest.raises(UserError, match="a prompt cannot"):
        assemble(tiny(rollout__engine="vllm"))
    assert library.calls[-1] == "shutdown in group: False"


def assert_same_rows(rows: Sequence[dict[str, Any]], run: Path) -> None:
    """The metrics of a run of one process, and of several."""
    for a, b in zip(rows, read_lines(run / "metrics.jsonl"), strict=True):
        assert {k: a[k] for k in COLUMNS} == pytest.approx({k: b[k] for k in COLUMNS}, rel=5e-5, abs=1e-7)


@pytest.mark.slow
def test_each_process_has_its_own(tiny: Tiny, library: type[Recorder], tmp_path: Path) -> None:
    """Two give the run of one; each is handed all weights, sharded or not, sleeps while it trains, and is
    closed before the group goes."""
    options = {"rollout__engine": "vllm", "rollout__vllm": {"enable_sleep_mode": True}, "optim__steps": 2}
    options |= {"student__lora_rank": 2, "optim__lr": 0.01, "eval__start": False}
    rows = [read_lines(train(tiny(**options), quiet=True).directory / "metrics.jsonl")]
    assert "distributed_executor_backend" not in library.settings

    def run(shard: str) -> None:
        library.calls.clear()
        train(tiny(**options, run__name=shard, parallel__shard=shard), quiet=True)
        assert library.settings["distributed_executor_backend"] == "external_launcher"
        assert library.calls.count("load") == 1 + 2
        assert library.calls[-2:] == ["sleep", "shutdown in group: True"]

    def both(_: int) -> None:
        run("none")
        run("layer")

    ended = forked(both, tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    runs = Path(tiny().run.dir)
    for shard in ("none", "layer"):
        assert_same_rows(rows[0], runs / shard)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "opd"}, {"name": "relay", "delta": 0.5}, {"name": "branch"}])
def test_a_group_shares_one(
    method: dict[str, Any], tiny: Tiny, library: type[Recorder], tmp_path: Path
) -> None:
    """Four processes with two between them: each runs what its neighbour asks, however often either does, and
    the run is that of one."""
    options = {"rollout__engine": "vllm", "rollout__prompts": 7, "optim__steps": 2}
    options |= {"parallel__timeout": TIMEOUT}
    options |= {f"method__{name}": value for name, value in method.items()}
    one = read_lines(train(tiny(**options), quiet=True).directory / "metrics.jsonl")
    group = {"tensor_parallel_size": 2, "enable_sleep_mode": True}
    config = tiny(**{**options, "rollout__vllm": group, "run__name": "group"})

    def run(rank: int) -> None:
        library.asked.clear()
        library.calls.clear()
        train(config, quiet=True)
        (tmp_path / f"asked{rank}").write_text(json.dumps(library.asked))
        (tmp_path / f"calls{rank}").write_text(json.dumps(library.calls))

    done_by_all(run, tmp_path, world=4)
    for kind in ("asked", "calls"):
        a, b, c, d = (json.loads((tmp_path / f"{kind}{rank}").read_text()) for rank in range(4))
        assert (a, c) == (b, d), "a vLLM of two runs the same in both"
    assert a[-2:] == ["sleep", "shutdown in group: True"]
    assert_same_rows(one, Path(config.run.dir) / "group")


class TakesTurns(Method):
    """One process asks while the other one has gone on to an exchange of all."""

    class Options(MethodOptions):
        """None."""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        for turn in range(2):
            if distributed.rank() == turn:
                student = self.tools.generators.student
                student.continue_from([r.context for r in rollouts], self.tools.sampling)
            self.tools.gather([turn])
        return Prepared(trajectories=[own_response(r) for r in rollouts])


EXCHANGING: dict[str, tuple[dict[str, Any], type[Method] | None]] = {
    "own method": ({}, TakesTurns),
    # The second process has no rollout of the old weights to score with the new ones.
    "refresh": ({"rollout__refresh": {"overlap_below": 0.99}, "rollout__prompts": 1}, None),
    # Some have rollouts that go on from a token of the world's, before all are dealt.
    "world": ({"data__train": "gym:train?spoil=0.5", "rollout__prompts": 2, "optim__steps": 6}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXCHANGING)
def test_who_comes_to_an_exchange_of_all_runs_what_its_group_asks(
    name: str, tiny: Tiny, library: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(_: object, rollout: Rollout) -> tuple[int, Any] | None:
        return (1, rollout.ids[0]) if sum(rollout.context) % 3 == 0 else None

    monkeypatch.setattr(SpoilingEngine, "_spoiled", spoiled)
    monkeypatch.setattr(SpoilingEngine, "_id", lambda _, token: token)
    options, method = EXCHANGING[name]
    options = {"rollout__prompts": 4, "optim__steps": 4, "parallel__timeout": TIMEOUT, **options}
    options["rollout__engine"] = "vllm"
    group = {"tensor_parallel_size": 2, "enable_sleep_mode": True}
    config = tiny(**options, rollout__vllm=group, run__name="group")
    one = read_lines(train(tiny(**options), method=method, quiet=True).directory / "metrics.jsonl")
    done_by_all(lambda _: train(config, method=method, quiet=True), tmp_path, world=2)
    assert_same_rows(one, Path(config.run.dir) / "group")


class Leaves(Method):
    """One process has had enough while the other one asks."""

    class Options(MethodOptions):
        """None."""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        if distributed.rank() == 1:
            raise UserError("this one has had enough")
        self.tools.generators.student.continue_from([r.context for r in rollouts], self.tools.sampling)
        raise AssertionError("nobody answers")


@pytest.mark.slow
def test_whoever_leaves_a_group_ends_it(tiny: Tiny, library: type[Recorder], tmp_path: Path) -> None:
    options = {"rollout__engine": "vllm", "rollout__vllm": {"tensor_parallel_size": 2}}
    config = tiny(**options, parallel__timeout=TIMEOUT)
    begun = time.monotonic()
    ended = forked(lambda _: train(config, method=Leaves, quiet=True), tmp_path)
    assert time.monotonic() - begun < TIMEOUT
    assert [code for code, _, _ in ended] == [2, 2]
    assert all("this one has had enough" in err for _, _, err in ended)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 2}, r"tensor_parallel_size 2 .* there is one; .*--nproc-per-node 2"),
        ({"tensor_parallel_size": "2"}, r"tensor_parallel_size is '2'; give a number"),
        ({"pipeline_parallel_size": 2}, r"pipeline_parallel_size is for servers \(rollout\.url\)"),
    ],
)
def test_groups_that_cannot_be_made(options: dict[str, Any], words: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=rf"rollout\.vllm: {words}"):
        assemble(tiny(rollout__engine="vllm", rollout__vllm=options))


def test_a_group_does_not_write_ahead(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"rollout\.overlap .* tensor_parallel_size"):
        tiny(rollout__engine="vllm", rollout__vllm={"tensor_parallel_size": 2}, rollout__overlap=True)
