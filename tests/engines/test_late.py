"""Models stored in half precision and trained in float32: in shards no process casts a whole one, and every
weight is what one process has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from onpath.config import Student
from onpath.config.whole import Config
from onpath.engines import late, sharding
from onpath.engines.head import decoder_of
from onpath.engines.models import load_model
from onpath.run.assemble import assemble
from onpath.system import distributed
from onpath.training import train
from tests.conftest import make_model, make_tokenizer
from tests.forks import TIMEOUT, done_by_two, free_ports

Tiny = Callable[..., Config]
CPU = torch.device("cpu")
CASES: list[dict[str, Any]] = [
    {},
    {"parallel__shard": "step", "optim__bf16": True},
    {"student__lora_rank": 4},
    {"student__lora_rank": 4, "student__lora_targets": ["q_proj", "lm_head", "embed_tokens"]},
    {"parallel__teacher": "copy"},
    {"rollout__overlap": True},
    {"rollout__overlap": True, "student__lora_rank": 4},
    *({"method__name": "opsd", "method__weights": weights} for weights in ("base", "ema")),
    {"method__name": "opsd", "method__weights": "ema", "parallel__teacher": "copy"},
    {"method__name": "opsd", "method__weights": "base", "student__lora_rank": 4},
]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Student and teacher in half precision; the teacher in several files."""
    root = tmp_path_factory.mktemp("stored")
    for seed, (name, size) in enumerate((("student", "1GB"), ("teacher", "20KB"))):
        model = make_model(seed, tied=name == "student").to(request.param)
        model.save_pretrained(root / name, max_shard_size=size)
        make_tokenizer().save_pretrained(root / name)
    assert len(list((root / "teacher").glob("*.safetensors"))) > 1
    return {f"{name}__model": str(root / name) for name in ("student", "teacher")}


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    """Of all models of a run that begins, whole."""
    parts = assemble(config)
    student, sampler = parts.models.student, getattr(parts.overlap, "_frozen", None)
    models = {"student": student, "sampler": sampler}
    models |= {f"teacher {i}": m for i, m in enumerate(parts.models.teacher.models) if m is not student}
    return {
        f"{name} {key}": sharding.full(tensor.detach()).clone()
        for name, model in models.items() if model is not None
        for key, tensor in (*model.named_parameters(), *model.named_buffers())
    }  # fmt: skip


def test_all_weights_are_those_of_one_process(tiny: Tiny, tmp_path: Path, stored: dict[str, str]) -> None:
    ways = {"teacher__device": "auto", "parallel__timeout": TIMEOUT}
    configs = [tiny(**{**stored, **ways, "parallel__shard": "layer", **case}) for case in CASES]
    plain = [
        {k: v for k, v in case.items() if k not in ("parallel__shard", "parallel__teacher")} for case in CASES
    ]
    alone = [weights_of(tiny(**stored, teacher__device="auto", **case)) for case in plain]
    ports = free_ports(len(CASES))

    def run(rank: int) -> None:
        for i, config in enumerate(configs):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MASTER_PORT", ports[i])
                with distributed.one_fate():
                    save_file(weights_of(config), tmp_path / f"{i}-{rank}.safetensors")

    done_by_two(run, tmp_path)
    for i, expected in enumerate(alone):
        assert {t.dtype for t in expected.values()} == {torch.float32}
        for rank in range(2):
            found = load_file(tmp_path / f"{i}-{rank}.safetensors")
            assert found.keys() == expected.keys(), CASES[i]
            assert {t.dtype for t in found.values()} == {torch.float32}, CASES[i]
            wrong = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
            assert not wrong, CASES[i]


def test_one_layer_is_cast_after_the_other(
    tiny: Tiny, tmp_path: Path, stored: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is whole in float32 while a model is put into shards is never more than one unit of it."""
    config = tiny(**stored, teacher__device="auto", parallel__shard="layer", parallel__timeout=TIMEOUT)
    real = sharding.fully_shard

    def run(rank: int) -> None:
        sizes: list[tuple[int, int]] = []
        models: list[nn.Module] = []
        shard = sharding.shard

        def noted(model: nn.Module, *args: Any, **options: Any) -> None:
            models[:] = [model]
            shard(model, *args, **options)

        def counted(unit: nn.Module, **options: Any) -> Any:
            held = {id(p): p for p in models[0].parameters() if p.dtype == torch.float32}
            mine = {id(p): p for p in unit.parameters()}
            sizes.append(tuple(  # type: ignore[arg-type]
                sum(p.numel() for p in found.values() if not isinstance(p, DTensor)) for found in (held, mine)
            ))  # fmt: skip
            return real(unit, **options)

        sharding.shard, sharding.fully_shard = noted, counted
        with distributed.one_fate():
            assemble(config)
        (tmp_path / f"sizes-{rank}").write_text(repr(sizes))

    done_by_two(run, tmp_path)
    for rank in range(2):
        sizes = eval((tmp_path / f"sizes-{rank}").read_text())
        assert len(sizes) == 2 + 1 + 2 + 2  # two layers, the teacher's own head, what is left; of both
        assert all(held == mine > 0 for held, mine in sizes)


def test_a_run_ends_with_what_one_process_writes(tiny: Tiny, tmp_path: Path, stored: dict[str, str]) -> None:
    options = {**stored, "teacher__device": "auto", "optim__steps": 1}
    sharded = tiny(
        **options, parallel__shard="layer", parallel__timeout=TIMEOUT, run__dir=str(tmp_path / "sharded")
    )
    alone = tiny(**options, run__dir=str(tmp_path / "alone"))
    train(alone)
    done_by_two(lambda rank: train(sharded), tmp_path)
    found, expected = (next(tmp_path.glob(f"{name}/*/model")) for name in ("sharded", "alone"))
    assert (found / "config.json").read_text() == (expected / "config.json").read_text()
    mine, theirs = (load_file(path / "model.safetensors") for path in (found, expected))
    assert all(torch.allclose(mine[n], t, atol=1e-6) and mine[n].dtype == t.dtype for n, t in theirs.items())


def loaded(path: Path) -> PreTrainedModel:
    return load_model(Student(model=str(path)), "student.model", CPU, shards=True)


def test_what_rounding_would_change_is_cast_at_once(tmp_path: Path) -> None:
    """Gemma multiplies embeddings by √H, which it keeps as a buffer of its weights' dtype."""
    config = Gemma3TextConfig(
        vocab_size=16, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=8,
    )  # fmt: skip
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = loaded(tmp_path)
    assert late.waits(model) is None
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert decoder_of(model).embed_tokens.embed_scale.item() == pytest.approx(24**0.5, rel=1e-7)


@pytest.mark.parametrize("mixed", [False, True])
def test_files_that_hold_float32_are_never_rounded(tmp_path: Path, mixed: bool) -> None:
    """Whatever their config says."""
    model = make_model(0)
    if mixed:
        for layer in model.model.layers:
            layer.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    told = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(told.replace('"float32"', '"bfloat16"'))
    found = loaded(tmp_path)
    assert late.waits(found) is None
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.state_dict().items())


def test_a_model_in_half_precision_waits_for_nothing(stored: dict[str, str]) -> None:
    section = Student(model=stored["student__model"], dtype="bfloat16")
    model = load_model(section, "student.model", CPU, shards=True)
    assert late.waits(model) is None
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
