"""One step of a published size: few tokens are sampled, the rest of each rollout is drawn at random.

Random weights make as much work as trained ones, and 2,048 tokens from transformers' own loop would take
minutes in which nothing is learnt about scoring and training.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from on_gpu.device import peak_gib, reset_peak
from on_gpu.shapes import SIZES, random_weights, write_model, write_prompts
from onpath import config as configuration
from onpath.engines.base import Engine
from onpath.methods import make_method
from onpath.records import Completion, Sampling
from onpath.run.assemble import assemble
from onpath.run.meter import Stopwatch
from onpath.run.parts import Parts


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a step."""

    student: str
    teacher: str
    rollouts: int
    prompt: int
    """Tokens of each prompt."""
    response: int
    sampled: int
    """Tokens of each response that the student really samples."""
    micro_batch_tokens: int
    window: int
    tiny: bool


def published(*, tiny: bool, rollouts: int = 64, response: int = 2048) -> Size:
    """Qwen3-1.7B with a Qwen3-8B teacher."""
    if tiny:
        rollouts, response = 4, 24
    return Size(
        student="qwen3-1.7b",
        teacher="qwen3-8b",
        rollouts=rollouts,
        prompt=6 if tiny else 150,
        response=response,
        sampled=2 if tiny else 16,
        micro_batch_tokens=64 if tiny else 16_384,
        window=4 if tiny else 50,
        tiny=tiny,
    )


class MostlyDrawn(Engine):
    """Samples the first tokens by another engine, and draws the others uniformly."""

    inner: Engine
    shares_weights = True

    def __init__(self, sampled: int, vocabulary: int) -> None:
        self.sampled, self.vocabulary = sampled, vocabulary

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`."""
        few = self.inner.continue_from(prefixes, replace(sampling, max_new_tokens=self.sampled), keys=keys)
        size = len(prefixes), sampling.max_new_tokens
        drawn = torch.randint(4, self.vocabulary, size, generator=torch.Generator().manual_seed(0)).tolist()
        ids = [(*c.ids[:-1], *row)[: size[1]] for c, row in zip(few, drawn, strict=True)]
        return [Completion(ids=row, logprobs=(0.0,) * len(row), finish_reason="length") for row in ids]


def make(directory: Path, size: Size, method: dict[str, Any], **options: dict[str, Any]) -> Parts:
    """All parts of a run of this size; `options`: sections of the config, over the usual ones."""
    vocabulary = 256 if size.tiny else SIZES[size.student]["vocab_size"]
    for name in {size.student, size.teacher}:
        write_model(directory / name, name, tiny=size.tiny)
    write_prompts(directory / "prompts.jsonl", size.rollouts, size.prompt, vocabulary)
    tree: dict[str, dict[str, Any]] = {
        "student": {"model": str(directory / size.student), "gradient_checkpointing": True},
        "teacher": {"model": str(directory / size.teacher), "dtype": "bfloat16"},
        "data": {"train": str(directory / "prompts.jsonl"), "eval": {}, "template": "plain"},
        "method": method,
        "rollout": {"prompts": size.rollouts, "max_new_tokens": size.response},
        "optim": {"steps": 1000, "lr": 1e-6, "schedule": "constant", "warmup": 0.0, "bf16": True,
                  "micro_batch_tokens": size.micro_batch_tokens},
        "run": {"dir": str(directory / "runs"), "name": "step", "save_every": 0},
    }  # fmt: skip
    config = configuration.build({k: {**tree.get(k, {}), **options.get(k, {})} for k in {**tree, **options}})
    engine = MostlyDrawn(size.sampled, vocabulary)
    with random_weights():
        parts = assemble(config, engine=engine)
    engine.renderer, engine.inner = parts.text.renderer, parts.generators.over(parts.models.student)
    return parts


def with_method(parts: Parts, method: dict[str, Any]) -> Parts:
    """The same models and prompts under another method."""
    tree = json.loads(parts.config.model_dump_json())
    changed = configuration.build({**tree, "method": method})
    return replace(parts, config=changed, method=make_method(changed.method, parts.tools))


class Watch(Stopwatch):
    """Peak memory by stage as well."""

    peaks: dict[str, float]

    def __init__(self) -> None:
        super().__init__()
        self.peaks = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        reset_peak()
        with super().__call__(stage):
            yield
        self.peaks[stage] = max(self.peaks.get(stage, 0.0), peak_gib())


@contextmanager
def counted_calls(model: Any) -> Iterator[list[int]]:
    """Rows × tokens of every call that generates: it says the positions, a scoring pass does not."""
    from onpath.engines.head import decoder_of

    calls: list[int] = []

    def note(_: Any, __: Any, kwargs: Any) -> None:
        if kwargs.get("position_ids") is not None:
            calls.append(kwargs["input_ids"].numel())

    handle = decoder_of(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
