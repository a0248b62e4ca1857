"""Weights that are pushed have a checkpoint's names, shapes and values, whatever transformers has fused."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D

from onpath.config.whole import Config
from onpath.engines.head import sharded, unwrapped
from onpath.engines.weights import check_checkpoint, checkpoint_weights, save_weights
from onpath.run.assemble import assemble
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import make_model, make_tokenizer
from tests.engines.test_server import fake_of
from tests.families.build import build
from tests.forks import TIMEOUT, done_by_two

Tiny = Callable[..., Config]

RENAMED = (
    "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "gpt_neox", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "jamba", "minimax", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_moe", "qwen3_next",
)  # fmt: skip
"""Families whose tensors in memory are not those of a checkpoint."""


def saved(model: PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def on_attention(model: PreTrainedModel) -> PeftModel:
    """With an adapter on each linear layer that mixes tokens, or on the first where none has such a name."""
    parts, head = ("attn", "attention", "mixer", "mamba"), model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    # peft has none on what a Mamba layer's kernel reads by itself.
    inside = [n for n in linear if any(p in n for p in parts) and not n.endswith("out_proj")]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=inside or linear[:1]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    return adapted


def check_like_saved(family: str, lora: bool, directory: Path) -> set[str]:
    """The names that are pushed."""
    model = build(family, 0)
    plain = saved(model, directory / "plain")
    pushed = on_attention(model) if lora else model
    save_weights(pushed, directory / "pushed")
    found = load_file(directory / "pushed" / "model.safetensors")
    if lora:
        model = pushed.merge_and_unload()
    expected = saved(model, directory / "saved")
    head = model.get_output_embeddings().weight
    also = {n for n, p in model.named_parameters(remove_duplicate=False) if p is head}
    assert expected.keys() <= found.keys() <= expected.keys() | also
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    moved = [n for n, t in expected.items() if not torch.equal(t, plain[n])]
    assert bool(moved) is lora, "the adapter has something to add"
    return {*found}


@pytest.mark.filterwarnings("ignore")  # of families as they come
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", *RENAMED])
def test_pushed_weights_are_a_checkpoint(family: str, lora: bool, tmp_path: Path) -> None:
    names = check_like_saved(family, lora, tmp_path)
    assert (names != {*build(family, 0).state_dict()}) is (family in RENAMED), "else nothing is tested"


@pytest.mark.filterwarnings("ignore")
def test_one_fused_tensor_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def watched(tensor: Tensor) -> Tensor:
        found = tensor.clone()
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr("onpath.engines.adapters.full", watched)
    model = build("mixtral", 0)
    for name, _ in checkpoint_weights(model):
        assert sum(ref() is not None for ref in alive) <= 2, name
    assert len(alive) == len(model.state_dict())


def converted(converter: WeightConverter) -> PreTrainedModel:
    """A model whose checkpoint has other tensors, as `from_pretrained` says."""
    model = make_model(0)
    model._weight_conversions = [converter]
    return model


def test_what_a_checkpoint_has_in_one_tensor_is_gathered_together(tmp_path: Path) -> None:
    parts = [f"self_attn.{n}_proj.weight" for n in "qkv"]
    model = converted(WeightConverter("self_attn.qkv.weight", parts, [Chunk(dim=0)]))
    expected = saved(model, tmp_path / "saved")
    assert expected["model.layers.0.self_attn.qkv.weight"].shape == (64, 32)
    save_weights(model, tmp_path / "pushed")
    found = load_file(tmp_path / "pushed" / "model.safetensors")
    assert found.keys() == expected.keys() | {"lm_head.weight"}
    assert all(torch.equal(t, found[n]) for n, t in expected.items())


class OneWay(ConversionOps):
    """Cannot be undone."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        raise ValueError("no way back")

    @property
    def reverse_op(self) -> ConversionOps:
        return self


@pytest.mark.parametrize(
    "converter",
    [
        WeightConverter("mlp.gate.weight", "mlp.gate_proj.weight", [OneWay()]),
        WeightConverter(
            "norms.weight", [f"layers.{i}.input_layernorm.weight" for i in (0, 1)], [Chunk(dim=0)]
        ),
    ],
    ids=["raises", "over layers"],
)
def test_what_cannot_be_undone_is_refused(converter: WeightConverter, tmp_path: Path) -> None:
    model = converted(converter)
    with pytest.raises(
        UserError, match=r"student\.model: the weights of qwen3 models .*use rollout.engine hf"
    ):
        check_checkpoint(model, "student.model")


def test_an_engine_that_would_be_given_wrong_names_is_refused_when_it_is_made(
    tiny: Tiny, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_of(model_dirs["student"])
    config = tiny(rollout__engine="vllm", rollout__url=fake.url)
    monkeypatch.setattr("onpath.engines.weights.revert_weight_conversion", OneWay().convert)
    with pytest.raises(UserError, match="cannot be given to a vLLM"):
        assemble(config)
    fake.stop()


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, str]:
    """Options of a student and a teacher with experts."""
    for seed, name in enumerate(("student", "teacher")):
        build("qwen3_moe", seed, vocab_size=48).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return {f"{name}__model": str(tmp_path / name) for name in ("student", "teacher")}


@pytest.mark.filterwarnings("ignore")
def test_experts_arrive_at_a_server(experts: dict[str, str], tiny: Tiny) -> None:
    fake = fake_of(Path(experts["student__model"]))
    before = {n: t.clone() for n, t in unwrapped(fake.engine.model).state_dict().items()}
    options = {"rollout__engine": "vllm", "rollout__url": fake.url, "optim__steps": 2, "optim__lr": 1e-3}
    result = train(tiny(**experts, **options), quiet=True)
    fake.stop()
    trained = AutoModelForCausalLM.from_pretrained(result.model).state_dict()
    held = unwrapped(fake.engine.model).state_dict()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert float((trained[name] - before[name]).abs().max()) > 1e-4
    assert all(torch.equal(t, held[n]) for n, t in trained.items())


def saves_sharded(config: Config, out: Path) -> None:
    student = assemble(config).models.student
    assert sharded(student)
    save_weights(student, out)


@pytest.mark.filterwarnings("ignore")
def test_experts_in_shards_are_given_whole(experts: dict[str, str], tiny: Tiny, tmp_path: Path) -> None:
    options = {"parallel__shard": "layer", "parallel__timeout": TIMEOUT, "teacher__device": "auto"}
    config = tiny(**experts, **options)
    done_by_two(lambda _: saves_sharded(config, tmp_path / "pushed"), tmp_path)
    expected, found = (load_file(tmp_path / d / "model.safetensors") for d in ("student", "pushed"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, found[n]) for n, t in expected.items())
