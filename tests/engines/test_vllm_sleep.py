"""vLLM in this process gives its memory back between phases: the calls and their order, noted by a stand-in.
(The CPU build does not sleep.)"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from onpath.config.build import Config
from onpath.engines.hf import HFEngine
from onpath.records import Sampling
from onpath.run.log import read_lines
from onpath.training import train
from tests.engines.test_server import fake_of

Tiny = Callable[..., Config]


class Recorder:
    """A `vllm.LLM` over an engine of ours; its calls in their order."""

    engine: HFEngine
    calls: list[str]

    def __init__(self, **settings: Any) -> None:
        self.settings, self.asleep = settings, False

    def generate(self, prompts: Sequence[Any], params: Sequence[Any], *, use_tqdm: bool) -> list[Any]:
        assert not self.asleep
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
    monkeypatch.setattr(module, "LLM", lambda model, **settings: Recorder(**settings), raising=False)
    monkeypatch.setattr(module, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return Recorder


@pytest.mark.parametrize("sleeps", [True, False])
def test_it_sleeps_while_the_student_trains(sleeps: bool, tiny: Tiny, library: type[Recorder]) -> None:
    options = {"enable_sleep_mode": True} if sleeps else {}
    config = tiny(rollout__engine="vllm", rollout__vllm=options, optim__steps=2, eval__start=False)
    result = train(config, quiet=True)
    assert len(read_lines(result.directory / "metrics.jsonl")) == 2
    calls = library.calls
    if not sleeps:
        assert not {"sleep", "wake"} & set(calls)
        return
    for i, call in enumerate(calls):
        if call == "write":
            assert calls[i + 1] == "sleep", "memory is free as soon as the samples are there"
        if call == "load":
            assert calls[i + 1] == "score", "the check after a push does not send it to sleep"
    assert calls.count("sleep") == calls.count("write")
