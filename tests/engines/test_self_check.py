"""The start-up check finds what it is for; families are right, or refused in one sentence."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, BloomConfig, GPT2Config, LlamaConfig, MambaConfig, MptConfig, Phi3Config

from onpath.commands.doctor.command import run_doctor
from onpath.config.whole import Config
from onpath.data.render import Renderer
from onpath.engines import self_check
from onpath.engines.decoding.kv_cache import _PreallocatedLayer, accepts_4d_mask
from onpath.engines.head import generating, hidden_states
from onpath.engines.hf import HFEngine
from onpath.engines.models import context_length
from onpath.engines.self_check import check_model
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.optimizer import make_optimizer
from onpath.run.parts import Parts
from onpath.system.errors import UserError
from onpath.training import one_step, sample, train
from tests.conftest import make_model, make_tokenizer
from tests.engines.test_hf import lora
from tests.families.build import build
from tests.families.plain import SMALL, compare, pair

Tiny = Callable[..., Config]


@pytest.fixture(autouse=True)
def _models_are_checked_once() -> None:
    """Not here."""


def checked(model: nn.Module, **options: Any) -> self_check.Agreement:
    engine = HFEngine(model, Renderer(make_tokenizer()), stop_ids=frozenset({2}))
    return check_model(model, engine, key="student.model", vocabulary=48, **options)


# The check.


def test_a_model_that_is_right_agrees_with_itself() -> None:
    found = checked(make_model(0))
    assert found.tokens > 12
    assert found.scored_gap_nats < 1e-5
    assert found.generated_gap_nats is not None
    assert found.generated_gap_nats < 1e-5
    assert found.self_kl_nats is not None
    assert found.self_kl_nats < 1e-9


def test_weights_and_mode_stay_as_they_are() -> None:
    for model in (make_model(0), lora(make_model(0), scale=0.0)):
        model.train()
        before = {n: p.clone() for n, p in model.named_parameters()}
        checked(model)
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
        assert model.training


def test_an_adapter_is_looked_at_when_it_does_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """At zero it hides that the loss does not see it."""
    plain = make_model(0)
    monkeypatch.setattr(self_check, "hidden_states", lambda _, *rest: hidden_states(plain, *rest))
    with pytest.raises(UserError, match="its decoder and its output layer, read apart"):
        checked(lora(make_model(0), scale=0.0))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache whose first tokens are gone at the second call."""
    update = _PreallocatedLayer.update

    def forgetting(self: Any, keys: Any, values: Any, *rest: Any, **named: Any) -> Any:
        if self.buffers is not None:
            self.buffers[1][:, :, :2] = 0
        return update(self, keys, values, *rest, **named)

    monkeypatch.setattr(_PreallocatedLayer, "update", forgetting)


def test_a_cache_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    with pytest.raises(UserError, match="its cache does not hold what its next token depends on"):
        checked(make_model(0))


def test_rows_that_depend_on_the_rows_beside_them() -> None:
    model = make_model(0)
    rotary, forward = model.model.rotary_emb, model.model.rotary_emb.forward

    def stretched(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return forward(x, position_ids * (2 if int(position_ids.max()) > 11 else 1))

    rotary.forward = stretched
    with pytest.raises(UserError, match="in a padded batch a row depends on the rows beside it"):
        checked(model)


def test_noise_in_the_pass_that_trains() -> None:
    def noisy(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 0.05 * torch.randn_like(out) if torch.is_grad_enabled() else out

    model = make_model(0)
    model.model.norm.register_forward_hook(noisy)
    with pytest.raises(UserError, match="two passes over the same tokens differ"):
        checked(model)
    assert checked(model, dropout=True).self_kl_nats is None


def test_a_window_is_crossed() -> None:
    config = LlamaConfig(max_position_embeddings=256)
    assert max(map(len, self_check._prefixes(config, 48))) == 9
    config.sliding_window = 16
    lengths = [len(p) for p in self_check._prefixes(config, 48)]
    assert 13 in lengths
    assert 19 in lengths
    config.sliding_window = 4096
    assert max(map(len, self_check._prefixes(config, 48))) == 9


def test_doctor_says_what_was_measured_and_names_the_cause(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {f.name: f for f in run_doctor(tiny()).findings}
    assert found["passes"].status == "ok"
    assert found["passes"].values["student.model"]["generated_gap_nats"] < 1e-4
    forget(monkeypatch)
    found = {f.name: f for f in run_doctor(tiny()).findings}
    assert found["passes"].status == "fail"
    assert "its cache does not hold" in found["passes"].message
    assert found["gradient"].status == "skipped"


# Masks of our own.


@pytest.mark.parametrize(
    ("family", "takes"),
    [("llama", True), ("gpt2", True), ("bloom", False), ("mpt", False), ("falcon", True), ("mamba", False)],
)
def test_a_finished_mask_is_taken_by_those_that_honour_it(family: str, takes: bool) -> None:
    assert accepts_4d_mask(build(family, 0)) == takes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_are_honoured_while_a_bf16_run_generates(family: str) -> None:
    """It asks for the first time then, with some weights in half precision: autocast, without which they do
    not go together, must be on."""
    model = build(family, 0)
    with generating(model, bf16=True):
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
        assert accepts_4d_mask(model)


def test_masks_are_tried_without_autocast_where_it_only_rounds() -> None:
    model, rounded = build("llama", 0), list[bool]()
    model.register_forward_pre_hook(lambda *_: rounded.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        assert accepts_4d_mask(model)
    assert rounded == [False, False]


def test_a_lack_of_memory_is_no_answer() -> None:
    """Kept as one it would switch side-by-side decoding off for the rest of the run."""
    model = build("llama", 0)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        accepts_4d_mask(model)
    hook.remove()
    assert accepts_4d_mask(model)


def test_alibi_counts_columns() -> None:
    """A hidden token would still lie between the others."""
    assert not accepts_4d_mask(build("falcon", 0, alibi=True))


# Families. All of them: make test-families.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mamba", "bloom", "gpt2", "llama4_text"])
def test_a_family_is_right(family: str, tiny: Tiny, tmp_path: Path) -> None:
    assert not compare(tiny(**pair(tmp_path, family), **SMALL))


@pytest.mark.parametrize("family", ["openai-gpt", "rwkv", "recurrent_gemma"])
def test_a_family_is_refused(family: str, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"student.model: .*{family}.*use another model family") as refusal:
        assemble(tiny(**pair(tmp_path, family), **SMALL))
    assert "\n" not in str(refusal.value)


def test_router_logits_that_a_config_asks_for_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    losses = []
    for asked in (False, True):
        models = pair(tmp_path / str(asked), "qwen3_moe", output_router_logits=asked)
        assert AutoConfig.from_pretrained(models["student__model"]).output_router_logits == asked
        losses.append(first_step(assemble(tiny(**models, **SMALL))))
    assert losses[0] == losses[1]


# Dropout.


def first_step(parts: Parts) -> tuple[float, float]:
    """Loss and gradient norm."""
    optimizer, _ = make_optimizer(parts.config, parts.models.student)
    meter = one_step(parts, optimizer, 0)
    row = meter.row(parts.models.device)
    return row["loss"], row["grad_norm"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_student_that_is_its_teacher_has_loss_0_whatever_its_dropout(
    checkpointing: bool, tiny: Tiny, tmp_path: Path
) -> None:
    models = pair(tmp_path, "gpt2")
    assert AutoConfig.from_pretrained(models["student__model"]).resid_pdrop == 0.1
    options = {
        **SMALL,
        "student__model": models["student__model"],
        "teacher__model": models["student__model"],
    }
    loss, gradient = first_step(assemble(tiny(**options, student__gradient_checkpointing=checkpointing)))
    assert abs(loss) < 1e-6
    assert gradient < 1e-5
    loss, gradient = first_step(assemble(tiny(**options, student__dropout=True)))
    assert loss > 1e-2
    assert gradient > 1e-2


@pytest.mark.parametrize(
    ("family", "config", "noisy"),
    [
        ("gpt2", {}, True),
        ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, False),
        ("llama", {}, False),
        ("llama", {"attention_dropout": 0.1}, True),
        ("mixtral", {}, False),
        ("mixtral", {"router_jitter_noise": 0.1}, True),
    ],
)
def test_dropout_that_a_model_does_not_have_is_said(
    family: str, config: dict[str, Any], noisy: bool, tiny: Tiny, tmp_path: Path
) -> None:
    models = pair(tmp_path, family, **config)
    for asked in (True, False):
        parts = assemble(tiny(**models, **SMALL, student__dropout=asked))
        said = [w for w in parts.warnings if w.startswith("student.dropout: true has no effect here")]
        assert len(said) == (asked and not noisy)
    model = parts.models.student.train()
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        assert model(input_ids=ids).logits.equal(model(input_ids=ids).logits) != noisy


def test_an_adapters_dropout_acts_where_it_trains(tiny: Tiny) -> None:
    """From the second step on: an adapter begins with zeros. Its scores have none."""
    options = {**SMALL, "student__lora_rank": 4, "optim__lr": 0.05, "optim__steps": 2, "data__eval": {}}
    asked = {"student__dropout": True, "student__lora_dropout": 0.5}
    runs = [train(tiny(**options, **more, run__name=f"d{len(more)}"), quiet=True) for more in ({}, asked)]
    still, noisy = ([row["loss"] for row in read_lines(r.directory / "metrics.jsonl")] for r in runs)
    assert still[0] == pytest.approx(noisy[0], rel=1e-5)
    assert still[1] != pytest.approx(noisy[1], rel=1e-3)
    student = assemble(tiny(**options, **asked)).models.student
    ids = torch.tensor([[1, 5, 9, 7]])
    assert student.eval()(input_ids=ids).logits.equal(student(input_ids=ids).logits)


def test_a_dropout_on_the_head_alone_has_no_effect_and_is_said(tiny: Tiny) -> None:
    """The losses read the head by its weight, adapter included."""
    options = {"student__lora_rank": 4, "student__dropout": True, "student__lora_dropout": 0.5}
    for targets, said in ((["lm_head"], 1), (["lm_head", "q_proj"], 0)):
        parts = assemble(tiny(**SMALL, **options, student__lora_targets=targets))
        assert sum(w.startswith("student.dropout: true has no effect") for w in parts.warnings) == said


def test_scores_have_no_dropout_even_if_training_has(tiny: Tiny, tmp_path: Path) -> None:
    """TOPD's candidates are chosen by scores: alike, whatever the micro-batches."""
    models, found = pair(tmp_path, "gpt2"), []
    for size in (100, 16_384):
        options = {**SMALL, "optim__micro_batch_tokens": size, "student__dropout": True}
        parts = assemble(tiny(**models, **options, method__name="topd"))
        made = parts.method.prepare(sample(parts, 0), step=0).trajectories
        found.append([[g.start for g in t.guidance] for t in made])
    assert found[0] == found[1]


def test_a_checkpointed_copy_recomputes_its_own_layers(tiny: Tiny) -> None:
    student = assemble(tiny(student__gradient_checkpointing=True)).models.student
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    ids = torch.tensor([[1, 5, 9]])
    assert float(twin(input_ids=ids).logits.detach().abs().max()) > 1


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_gradient_checkpointing_runs_each_layer_again(asked: bool, dropout: bool, tiny: Tiny) -> None:
    student = assemble(tiny(student__gradient_checkpointing=asked, student__dropout=dropout)).models.student
    calls: list[int] = []
    student.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    student.train(dropout)(input_ids=torch.tensor([[1, 5, 9]])).logits.sum().backward()
    assert len(calls) == (2 if asked else 1)


# Configs.


def test_a_context_that_no_config_names_has_no_limit() -> None:
    for config in (BloomConfig(), MambaConfig(), MptConfig()):
        assert context_length(config) == sys.maxsize
    assert context_length(GPT2Config(n_positions=77)) == 77


def test_positions_that_switch_end_the_context() -> None:
    config = Phi3Config(
        original_max_position_embeddings=32,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [4.0] * 48,
            "rope_theta": 1e4,
        },
    )  # fmt: skip
    assert context_length(config) == 32


def test_a_model_without_a_limit_trains_and_the_doctor_says_so(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(**pair(tmp_path, "bloom"), **SMALL, optim__steps=1)
    assert train(config, quiet=True).model.is_dir()
    found = {f.name: f for f in run_doctor(config).findings}
    assert found["context"].status == "skipped"
    assert found["restored"].status == "ok"
