"""Adapters on layers that are also read by their weight, and adapters of adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from onpath.commands.eval import evaluate_model
from onpath.commands.export import export_model
from onpath.config.sections import Student
from onpath.config.whole import Config
from onpath.engines.adapters import merged_weights
from onpath.engines.head import check_head, head_of, hidden_states, unwrapped
from onpath.engines.models import load_model, quietly
from onpath.engines.student import trainable
from onpath.run.assemble import assemble
from onpath.run.checkpoint import load_weights
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import CHARACTERS, make_model, make_tokenizer

Tiny = Callable[..., Config]
IDS_BT = torch.tensor([[1, 5, 9, 13, 8, 3, 20]])
CPU = torch.device("cpu")
TARGETS: list[list[str]] = [
    ["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"], ["q_proj", "v_proj"],
]  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS_BT).logits


def logits_at(path: Path, key: str = "model") -> torch.Tensor:
    return logits(load_model(Student.model_validate({"model": str(path), "device": "cpu"}), key, CPU))


def saved(path: Path, *, tied: bool, vocabulary: int = len(CHARACTERS)) -> str:
    make_model(0, tied=tied, vocabulary=vocabulary).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def loud(model: Any) -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
    return model


def adapted(tiny: Tiny, tmp_path: Path, *, tied: bool, targets: list[str]) -> Any:
    config = tiny(
        student__model=saved(tmp_path / "base", tied=tied),
        student__lora_rank=4,
        student__lora_targets=targets,
    )
    return loud(trainable(config, load_model(config.student, "student.model", CPU)))


# The loss: value and gradient.


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_takes_effect_in_what_the_loss_reads(
    tied: bool, targets: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    model = adapted(tiny, tmp_path, tied=tied, targets=targets)
    check_head(model, "student.model")
    hidden = hidden_states(model, IDS_BT)
    head = head_of(model)
    ours = (hidden @ head.weight.T).log_softmax(-1)
    ours[0, :, 3].sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = model(input_ids=IDS_BT).logits.log_softmax(-1)
    plain[0, :, 3].sum().backward()
    assert torch.allclose(ours, plain, atol=1e-5)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all((found[n] - expected[n]).norm() < 1e-4 * (expected[n].norm() + 1e-3) for n in found)
    assert any("lora_" in n for n in found)


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_weights_give_the_adapted_models_logits(
    tied: bool, targets: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    model = adapted(tiny, tmp_path, tied=tied, targets=targets)
    plain = make_model(3, tied=False)
    plain.load_state_dict(dict(merged_weights(model)))
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)
    base = make_model(3, tied=tied)
    base.load_state_dict(dict(merged_weights(model, adapted=False)))
    assert torch.equal(logits(base), logits(make_model(0, tied=tied)))


def test_topds_embeddings_and_a_base_teachers_head_are_the_adapted_and_the_plain_ones(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny(
        student__model=saved(tmp_path / "base", tied=True),
        student__lora_rank=4,
        student__lora_targets=["lm_head", "q_proj"],
        method__name="opsd",
        method__weights="base",
    )
    parts = assemble(config)
    base = logits(unwrapped(parts.models.student))
    loud(parts.models.student)
    head = parts.models.teacher.head
    with parts.models.teacher.acting() as model:
        assert torch.allclose(hidden_states(model, IDS_BT) @ head.weight.T, base, atol=1e-5)
    assert not torch.allclose(logits(parts.models.student), base, atol=0.1)


# What is saved.


def in_run(tiny: Tiny, name: str, model: str, **options: Any) -> tuple[Config, Path]:
    """A short, loud run."""
    data = {"optim__steps": 2, "optim__lr": 3e-2, "run__save_every": 1, "run__name": name, **options}
    config = tiny(student__model=model, **data)
    return config, train(config, quiet=True).directory


def trained(config: Config, run: Path) -> torch.Tensor:
    """Logits of the run's own model after its last step, as resuming there has it."""
    model = assemble(config).models.student
    load_weights(run / "checkpoints" / "step_2", model)
    return logits(model)


LORA: dict[str, Any] = {"student__lora_rank": 4, "student__lora_alpha": 16}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "merged": {**LORA, "student__lora_merge": True},
    "embeddings": {**LORA, "student__lora_merge": True, "student__lora_targets": ["q_proj", "embed_tokens"]},
    "head": {**LORA, "student__lora_merge": True, "student__lora_targets": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize(
    ("way", "tied", "second"),
    [
        *((way, True, False) for way in WAYS),
        ("full", False, False),
        ("head", False, False),
        *((way, True, True) for way in ("full", "merged", "embeddings", "head")),
    ],
)
def test_what_is_saved_is_what_was_trained(
    way: str, tied: bool, second: bool, tiny: Tiny, tmp_path: Path, data_file: Path
) -> None:
    """Logits, and the evaluation: the run's own last line is `onpath eval` of the model."""
    start = saved(tmp_path / "base", tied=tied, vocabulary=60)  # more rows than ids
    if second:
        start = str(in_run(tiny, "first", start, **WAYS["embeddings"], data__eval={})[1] / "model")
    config, run = in_run(tiny, "run", start, **WAYS[way])
    expected = trained(config, run)
    assert torch.allclose(logits_at(run / "model"), expected, atol=1e-5)
    assert not torch.allclose(logits_at(Path(start)), expected, atol=0.05), "training must move the logits"
    for out in (
        export_model(run, tmp_path / "final"),
        export_model(run / "checkpoints" / "step_2", tmp_path / "step"),
    ):
        assert torch.allclose(logits_at(out), expected, atol=1e-5)
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), expected, atol=1e-5)
    if "student__lora_merge" in WAYS[way]:
        assert torch.allclose(
            logits(AutoModelForCausalLM.from_pretrained(run / "merged")), expected, atol=1e-5
        )
    (line,) = train(config, quiet=True).evaluations
    asked = config.eval
    (found,) = evaluate_model(
        run / "model", data=data_file, limit=config.data.eval_limit, n=asked.n, k=asked.k, grader="exact",
        max_new_tokens=asked.max_new_tokens, seed=asked.seed, device="cpu", out=tmp_path / "eval",
    ).results.values()  # fmt: skip
    for key in ("avg_at_k", "pass_at_k", "mean_length", "finished"):
        assert found.to_json()[key] == line[key], key


def test_an_adapter_of_a_second_stage_loads_in_plain_peft_and_moves_with_its_base(
    tiny: Tiny, tmp_path: Path
) -> None:
    first = in_run(tiny, "first", saved(tmp_path / "base", tied=True), **LORA, data__eval={})[1]
    config, run = in_run(tiny, "second", str(first / "model"), **LORA, data__eval={})
    expected = trained(config, run)
    exported = export_model(run / "checkpoints" / "step_2", tmp_path / "step", adapter=True)
    for out in (run / "model", export_model(run, tmp_path / "adapter", adapter=True), exported):
        described = peft.PeftConfig.from_pretrained(str(out))
        assert described.base_model_name_or_path == str(out.resolve() / "base")
        with quietly():
            base = AutoModelForCausalLM.from_pretrained(described.base_model_name_or_path)
            assert torch.allclose(logits(PeftModel.from_pretrained(base, out)), expected, atol=1e-5)
    (run / "model").rename(tmp_path / "moved")
    assert torch.allclose(logits_at(tmp_path / "moved"), expected, atol=1e-5)


def test_a_third_stage_and_all_weights_after_an_adapter(tiny: Tiny, tmp_path: Path) -> None:
    start = saved(tmp_path / "base", tied=True)
    for stage, way in enumerate(("lora", "head", "lora", "full")):
        config, run = in_run(tiny, f"stage-{stage}", start, **WAYS[way], data__eval={})
        assert torch.allclose(logits_at(run / "model"), trained(config, run), atol=1e-5), stage
        start = str(run / "model")


# Adapters from elsewhere.


def elsewhere(tmp_path: Path, config: Any) -> tuple[Path, torch.Tensor]:
    base = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "base", tied=True))
    torch.manual_seed(1)
    with quietly():
        model = get_peft_model(base, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    with quietly():
        model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's: a tied layer is adapted
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5, 9]},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ],
    ids=lambda options: "+".join(options),
)
def test_adapters_made_elsewhere_have_their_own_logits(options: dict[str, Any], tmp_path: Path) -> None:
    path, expected = elsewhere(tmp_path, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    assert torch.allclose(logits_at(path), expected, atol=1e-4)
    out = tmp_path / "again"
    section = Student.model_validate({"model": str(path), "device": "cpu"})
    load_model(section, "model", CPU).save_pretrained(out)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), expected, atol=1e-4)


def test_an_adapter_that_cannot_be_merged_is_one_sentence(tmp_path: Path) -> None:
    path, _ = elsewhere(tmp_path, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="PROMPT_TUNING cannot be merged into its base"):
        logits_at(path)
