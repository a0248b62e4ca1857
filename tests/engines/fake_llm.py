"""A stand-in for the package `vllm` in this process: it answers greedily, with a real model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM


class FakeLLM:
    """`vllm.LLM`; `made` are all of them, in order."""

    made: ClassVar[list["FakeLLM"]] = []

    def __init__(self, model: str, **settings: Any) -> None:
        assert all(llm.ended for llm in self.made), "two at once"
        self.directory, self.settings, self.ended, self.pushes = Path(model), settings, False, 0
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._end))
        self.made.append(self)

    def _end(self) -> None:
        self.ended = True

    def collective_rpc(self, name: str, kwargs: Mapping[str, Iterable[tuple[str, torch.Tensor]]]) -> None:
        assert name == "reload_weights"
        self.model.load_state_dict(dict(kwargs["weights_iterator"]), strict=False)
        self.pushes += 1

    def reset_prefix_cache(self) -> None:
        """There is none."""

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Mapping[str, list[int]]], params: Sequence[Any], use_tqdm: bool
    ) -> list[Any]:
        assert not self.ended
        assert not use_tqdm
        made = []
        for prompt, asked in zip(prompts, params, strict=True):
            ids, told = prompt["prompt_token_ids"], vars(asked)
            if told.get("prompt_logprobs") is not None:
                made.append(SimpleNamespace(prompt_logprobs=[None, *self._entries(ids)]))
                continue
            assert told["temperature"] == 0, "this one is greedy"
            new: list[int] = []
            while len(new) < told["max_tokens"] and not {*new} & {*told["stop_token_ids"]}:
                new.append(int(self._logp([*ids, *new])[-1].argmax()))
            entries = self._entries([*ids, *new])[len(ids) - 1 :]
            made.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=new, logprobs=entries)]))
        return made

    def _logp(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def _entries(self, ids: list[int]) -> list[dict[int, Any]]:
        logp = self._logp(ids)
        return [{t: SimpleNamespace(logprob=float(logp[i, t]))} for i, t in enumerate(ids[1:])]


def fake_vllm(set_module: Callable[[str, ModuleType], None]) -> type[FakeLLM]:
    """The package, where `import vllm` finds it."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace  # type: ignore[attr-defined]
    set_module("vllm", module)
    FakeLLM.made.clear()
    return FakeLLM
