"""Two ranks that hold half of every weight each give what one process gives, and planted faults do not."""

import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from onpath import export_model
from onpath.config.build import Config
from onpath.engines import adapters, sharding
from onpath.engines.head import unwrapped
from onpath.engines.models import load_model
from onpath.engines.teacher import SelfTeacher
from onpath.engines.weights import save_weights
from onpath.records import Prompt, Sampling, Trajectory
from onpath.run import checkpoint, rounds
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.optimizer import make_optimizer
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import make_model, make_tokenizer
from tests.methods.test_trd import TEMPLATE
from tests.ranks import TIMEOUT, forked, free_port
from tests.run.test_resume import Stopped, stop_at
from tests.stepping import step_on

Tiny = Callable[..., Config]
SHARDED = {"parallel__timeout": TIMEOUT, "teacher__device": "auto"}
UNCLIPPED = {"optim__max_grad_norm": 1e9}  # clipping hides a factor


def trajectories(count: int) -> list[Trajectory]:
    """Of unequal lengths, some tokens weighted."""
    found = []
    for i in range(count):
        context, response = tuple(range(4, 7 + i % 4)), tuple(4 + (3 * i + j) % 12 for j in range(2 + 3 * i % 11))
        weights = tuple(0.5 + j % 3 for j in range(len(response)))
        found.append(
            Trajectory(
                student_context=context, teacher_context=context, response=response, weights=weights, place=i
            )
        )
    return found


def shares(case: str, rank: int | None) -> list[Trajectory]:
    """A rank's trajectories (None: all of them)."""
    everything = [] if case == "none" else trajectories(13)
    if rank is None:
        return everything
    cut = {"even": 6, "one": 1, "nothing": 0, "none": 0}[case]
    return [replace(t, place=i) for i, t in enumerate((everything[:cut], everything[cut:])[rank])]


def gradients(config: Config, share: list[Trajectory]) -> dict[str, torch.Tensor]:
    """Of one step, before clipping, of all weights, whole."""
    parts = assemble(config)
    named = {n: p for n, p in parts.models.student.named_parameters() if p.requires_grad}
    _, found = step_on(parts, share, micro_batch_tokens=40)
    assert not found or named.keys() == found.keys()
    return {n: sharding.full(g).clone() for n, g in found.items()}


def one_rank(config: Config, what: Callable[[], Any], number: int) -> Any:
    """In the process group of a case of its own."""
    os.environ["MASTER_PORT"] = str(int(os.environ["FIRST_PORT"]) + number)
    with distributed.one_fate():
        return what()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Students by family and by whether the head is the embeddings'."""
    root, found = tmp_path_factory.mktemp("families"), {}
    for tied in (True, False):
        torch.manual_seed(0)
        llama = LlamaForCausalLM(
            LlamaConfig(
                **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2), num_key_value_heads=1,
                vocab_size=make_model(0).config.vocab_size, hidden_size=32, intermediate_size=64, head_dim=16,
                max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.2,
                bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
        for family, model in (("qwen3", make_model(0, tied=tied)), ("llama", llama)):
            path = root / f"{family}-{'tied' if tied else 'untied'}"
            model.save_pretrained(path)
            make_tokenizer().save_pretrained(path)
            found[path.name] = path
    return found


GRADIENTS = [
    *((family, share, "layer", {}) for family in ("qwen3-tied", "llama-untied") for share in ("even", "one")),
    *((family, "nothing", "step", {}) for family in ("qwen3-untied", "llama-tied")),
    ("qwen3-tied", "nothing", "layer", {"student__lora_rank": 4}),
    ("qwen3-untied", "even", "step", {"student__lora_rank": 4}),
    ("qwen3-untied", "one", "layer", {"student__lora_rank": 4, "student__lora_targets": ["q_proj", "lm_head"]}),
    ("qwen3-tied", "none", "layer", {}),
    ("qwen3-tied", "one", "layer", {"student__gradient_checkpointing": True}),
    ("qwen3-untied", "even", "layer", {"parallel__hosts": 2}),
    ("qwen3-tied", "one", "layer", {"parallel__teacher": "copy"}),
]


def differences(
    tiny: Tiny, tmp_path: Path, families: Mapping[str, Path], cases: list[Any], patch: Callable[[], None] = int
) -> list[float]:
    """Of each case the largest error of any gradient, by the largest entry of its tensor."""
    configs = [
        tiny(student__model=str(families[family]), **options, parallel__shard=mode, **SHARDED, **UNCLIPPED)
        for family, _, mode, options in cases
    ]
    whole = [
        gradients(
            tiny(student__model=str(families[f]), teacher__device="auto", **plain(o), **UNCLIPPED),
            shares(s, None),
        )
        for f, s, _, o in cases
    ]
    first = int(free_port())

    def run(rank: int) -> None:
        os.environ["FIRST_PORT"] = str(first)
        patch()
        for i, ((_, share, _, _), config) in enumerate(zip(cases, configs, strict=True)):
            found = one_rank(config, lambda c=config, s=share: gradients(c, shares(s, rank)), i)
            save_file(found, tmp_path / f"{i}-{rank}.safetensors")

    ended = forked(run, tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    errors = []
    for i, expected in enumerate(whole):
        ranks = [load_file(tmp_path / f"{i}-{rank}.safetensors") for rank in range(2)]
        assert ranks[0].keys() == ranks[1].keys() == expected.keys()
        errors.append(
            max(
                float((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-12))
                for found in ranks
                for n, g in expected.items()
            )
            if expected
            else 0.0
        )
    return errors


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if not k.startswith("parallel__")}


def test_gradients_are_those_of_one_process(
    tiny: Tiny, tmp_path: Path, families: dict[str, Path]
) -> None:
    errors = differences(tiny, tmp_path, families, GRADIENTS)
    wrong = [(case, error) for case, error in zip(GRADIENTS, errors, strict=True) if not error < 2e-6]
    assert not wrong


def by_default() -> None:
    """Gradients divided by the number of processes."""
    torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor = lambda *_: None  # type: ignore[assignment]


def of_the_root_alone() -> None:
    real = torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor

    def of_root(unit: Any, factor: float) -> None:
        if hasattr(unit, "lm_head"):
            real(unit, factor)

    torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor = of_root  # type: ignore[method-assign]


def heavy_filler() -> None:
    context = (5,)  # the padding's own states are all zeros
    rounds._FILLER = replace(rounds._FILLER, weights=(1.0,), student_context=context, teacher_context=context)


@pytest.mark.parametrize("fault", [by_default, of_the_root_alone, heavy_filler])
def test_planted_faults_are_found(
    fault: Callable[[], None], tiny: Tiny, tmp_path: Path, families: dict[str, Path]
) -> None:
    (error,) = differences(tiny, tmp_path, families, [("qwen3-untied", "one", "layer", {})], fault)
    assert error > 1e-3


RUNS: dict[str, dict[str, Any]] = {
    "opd": {"rollout__prompts": 7, "eval__start": True, "run__trajectories_every": 1},
    "lora": {"student__lora_rank": 4, "method__cosine_every": 1, "optim__micro_batch_tokens": 60},
    "topd": {"method__name": "topd", "method__top_share": 0.5},
    "topd by step": {"method__name": "topd", "method__top_share": 0.5, "parallel__shard": "step"},
    "opsd ema": {"method__name": "opsd", "method__weights": "ema", "method__ema_decay": 0.5},
    "opsd base": {"method__name": "opsd", "method__weights": "base", "method__reweight": "teacher_entropy"},
    "opsd base of an adapter": {"method__name": "opsd", "method__weights": "base", "student__lora_rank": 4},
    "opsd live": {"method__name": "opsd", "method__weights": "live", "method__cosine_every": 1},
    "trd": {"method__name": "trd", "method__template": TEMPLATE, "method__gate": False, "rollout__prompts": 3},
    "trd offline": {"method__name": "trd", "method__template": TEMPLATE, "method__gate": False, "method__offline": True},
    "overlap": {"rollout__overlap": True, "parallel__shard": "step"},
    "not dealt": {"parallel__balance": False, "rollout__n": 2, "rollout__prompts": 3},
}
OPTIM = {"optim__steps": 2, "optim__lr": 1e-2, "optim__eps": 1e-4}  # else AdamW makes whole steps of rounding


@pytest.mark.slow
def test_runs_are_those_of_one_process(tiny: Tiny, tmp_path: Path) -> None:
    """Metrics, evaluations, trajectories and the saved model of every method."""

    def config(name: str, **more: Any) -> Config:
        options = {"teacher__device": "auto", "run__name": name.replace(" ", "-")}
        return tiny(**{**OPTIM, **options, **RUNS[name], **more})

    first = int(free_port())

    def run(rank: int) -> None:
        os.environ["FIRST_PORT"] = str(first)
        for i, name in enumerate(RUNS):
            options = {"run__dir": str(tmp_path / "two"), **SHARDED}
            options |= {"parallel__shard": RUNS[name].get("parallel__shard", "layer")}
            os.environ["MASTER_PORT"] = str(first + i)
            train(config(name, **options), quiet=True)

    ended = forked(run, tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    for name in RUNS:
        one = train(config(name, parallel__shard="none"), quiet=True).directory
        assert_same(one, tmp_path / "two" / one.name)


def assert_same(one: Path, two: Path) -> None:
    rows = [read_lines(run / "metrics.jsonl") for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 2
    for a, b in zip(*rows, strict=True):
        numbers = {k: v for k, v in a.items() if isinstance(v, int | float)}
        assert numbers == pytest.approx({k: b[k] for k in numbers}, rel=5e-5, abs=1e-6), one.name
    assert read_lines(one / "eval.jsonl") == read_lines(two / "eval.jsonl"), one.name
    tables = [sorted((run / "trajectories").glob("*.parquet")) for run in (one, two)]
    for a, b in zip(*tables, strict=True):
        columns = ["prompt_id", "sample", "response", "correct"]
        assert pq.read_table(a, columns=columns).equals(pq.read_table(b, columns=columns)), one.name
    files = [sorted(p.name for p in (run / "model").iterdir()) for run in (one, two)]
    assert files[0] == files[1]
    weights = [load_file(next((run / "model").glob("*.safetensors"))) for run in (one, two)]
    assert weights[0].keys() == weights[1].keys(), one.name
    for name, tensor in weights[0].items():
        assert tensor.allclose(weights[1][name], rtol=1e-4, atol=1e-5), (one.name, name)
