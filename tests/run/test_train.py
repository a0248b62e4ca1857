"""The whole step: against TRL, at the fixed point, towards the teacher, and what a run leaves behind."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import onpath
from onpath import config as configuration
from onpath.config.whole import Config
from onpath.engines.head import unwrapped
from onpath.engines.models import quietly
from onpath.engines.score_cache import weights_digest
from onpath.losses import head as head_module
from onpath.losses import rows as rows_module
from onpath.records import Edit, Trajectory
from onpath.run import checkpoint
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.opening import open_run
from onpath.run.optimizer import make_optimizer, rate
from onpath.run.parts import Parts
from onpath.system import code
from onpath.system.errors import UserError
from onpath.training import optimise, sample, train
from tests.conftest import CHARACTERS, make_model, make_tokenizer
from tests.stepping import flat, perturbed_copy, step_on

Tiny = Callable[..., Config]


def rollouts_of(parts: Parts) -> list[Trajectory]:
    """What plain OPD trains on in the first step."""
    return parts.method.prepare(sample(parts, 0), step=0).trajectories


def metrics(config: Config) -> list[dict[str, Any]]:
    return read_lines(Path(config.run.dir) / config.run.name / "metrics.jsonl")


# TRL as the oracle.


def trl_loss(parts: Parts, made: list[Trajectory], *, beta: float) -> Tensor:
    """`DistillationTrainer._compute_loss` on the same token batch, padded as TRL pads: prompts on the left,
    completions on the right."""
    trl = pytest.importorskip("trl.trainer.distillation_trainer")
    trainer = object.__new__(trl.DistillationTrainer)
    trainer.model_kwarg_keys, trainer._is_vlm = set(), False
    trainer.beta, trainer.temperature = beta, 1.0
    trainer.teacher_model = parts.models.teacher.model
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model, is_main_process=False)
    trainer._forward_redirection = lambda _, model, call, *rest, **named: call(*rest, **named)
    width = max(len(t.student_context) for t in made)
    length = max(len(t.response) for t in made)
    inputs = {
        "prompt_ids": [[0] * (width - len(t.student_context)) + list(t.student_context) for t in made],
        "prompt_mask": [[0] * (width - len(t.student_context)) + [1] * len(t.student_context) for t in made],
        "completion_ids": [list(t.response) + [0] * (length - len(t.response)) for t in made],
        "completion_mask": [[1] * len(t.response) + [0] * (length - len(t.response)) for t in made],
    }
    count = sum(len(t.response) for t in made)
    tensors = {name: torch.tensor(rows) for name, rows in inputs.items()}
    loss, _, valid = trainer._compute_loss(unwrapped(parts.models.student), tensors, count)
    assert int(valid) == count
    return loss


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.5, 0.2])
def test_trl_gives_the_same_loss_and_gradients(beta: float, tiny: Tiny) -> None:
    """TRL 1.16's β = 1 is reverse KL, β = 0 forward KL, in between Jensen-Shannon with the teacher's share
    β."""
    kind = {1.0: "reverse_kl", 0.0: "forward_kl"}.get(beta, "jensen_shannon")
    options = {"method__beta": beta} if kind == "jensen_shannon" else {}
    parts = assemble(tiny(method__divergence=kind, optim__max_grad_norm=1e9, data__eval={}, **options))
    made = [t.truncated(1 + 2 * i) for i, t in enumerate(rollouts_of(parts))]
    assert len({len(t.student_context) for t in made}) > 1
    assert len({len(t.response) for t in made}) > 3
    meter, ours = step_on(parts, made, micro_batch_tokens=60)
    theirs = trl_loss(parts, made, beta=beta)
    assert meter.row(parts.models.device)["loss"] == pytest.approx(float(theirs.detach()), abs=1e-5)
    named = {n: p for n, p in parts.models.student.named_parameters() if p.requires_grad}
    for (name, _), expected in zip(
        named.items(), torch.autograd.grad(theirs, list(named.values())), strict=True
    ):
        assert (ours[name] - expected).abs().max() < 1e-5, name
    assert flat(ours).norm() > 0.1
    assert float(theirs.detach()) > 0.05


# The fixed point, and what the gradient is made of.


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jensen_shannon", "sampled"])
def test_a_teacher_that_is_the_student_teaches_nothing(kind: str, tiny: Tiny) -> None:
    parts = assemble(tiny(method__divergence=kind, teacher__model=tiny().student.model))
    made = rollouts_of(parts)
    meter, gradients = step_on(parts, made)
    for name in ("reverse_kl", "forward_kl"):
        values = [v for place in range(len(made)) for v in meter.per_token[place][name]]
        assert len(values) == sum(len(t.response) for t in made)
        assert max(map(abs, values)) < 1e-6
    assert abs(meter.row(parts.models.device)["loss"]) < 1e-6
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-6


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jensen_shannon", "sampled"])
def test_the_gradient_contains_the_teacher(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """Another teacher, another direction: a loss whose gradient lost the teacher would move alike."""
    found = []
    for seed in (1, 2):
        make_model(seed, hidden=48).save_pretrained(tmp_path / str(seed))
        make_tokenizer().save_pretrained(tmp_path / str(seed))
        parts = assemble(
            tiny(
                method__divergence=kind,
                teacher__model=str(tmp_path / str(seed)),
                teacher__device="cpu",
                optim__max_grad_norm=1e9,
            )
        )
        found.append(flat(step_on(parts, rollouts_of(parts))[1]))
    cosine = torch.nn.functional.cosine_similarity(*found, dim=0)
    assert float(cosine) < 0.7


def test_directions_of_the_divergence_differ(tiny: Tiny) -> None:
    """Reverse KL's loss is the mean reverse KL that is logged beside it, and forward KL's the forward one."""
    for kind in ("reverse_kl", "forward_kl"):
        train(tiny(method__divergence=kind, run__name=kind, optim__steps=1, data__eval={}), quiet=True)
        (row,) = metrics(tiny(run__name=kind))
        other = "forward_kl" if kind == "reverse_kl" else "reverse_kl"
        assert row["loss"] == pytest.approx(row[f"{kind}_nats"], rel=1e-5)
        assert abs(row["loss"] - row[f"{other}_nats"]) > 1e-3


def test_the_teacher_stands_still_and_the_student_moves(tiny: Tiny) -> None:
    config = tiny(data__eval={})
    parts = assemble(config)
    before = [weights_digest(m) for m in (parts.models.teacher.model, parts.models.student)]
    assert not any(p.requires_grad for p in parts.models.teacher.model.parameters())
    optimise(parts, open_run(config, parts), quiet=True)
    after = [weights_digest(m) for m in (parts.models.teacher.model, parts.models.student)]
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert all(p.grad is None for p in parts.models.teacher.model.parameters())


@pytest.mark.parametrize(("lora", "lr"), [(0, 4e-3), (8, 1e-2)])
def test_a_perturbed_student_comes_back(lora: int, lr: float, tiny: Tiny, tmp_path: Path) -> None:
    student = perturbed_copy(make_model(1, hidden=48), tmp_path / "perturbed", scale=0.04)
    config = tiny(
        student__model=str(student),
        student__lora_rank=lora,
        student__lora_alpha=16,
        optim__steps=20,
        optim__lr=lr,
        rollout__prompts=16,
        data__eval={},
    )
    train(config, quiet=True)
    losses = [row["loss"] for row in metrics(config)]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert losses[0] > 0.01


def test_steps_follow_adamw_and_the_schedule(tiny: Tiny) -> None:
    """Two steps of plain torch with the gradients that the step hands over give the same weights."""
    config = tiny(optim__steps=2, optim__weight_decay=0.1, optim__max_grad_norm=0.5, data__eval={})
    parts = assemble(config)
    named = dict(parts.models.student.named_parameters())
    mine = {n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items()}
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in mine.values() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in mine.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=config.optim.betas,
        eps=config.optim.eps,
    )
    for step in range(2):
        made = parts.method.prepare(sample(parts, step), step=step).trajectories
        meter, gradients = step_on(parts, made)
        raw = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
        assert raw == pytest.approx(0.5, rel=1e-4), "clipped to the norm asked for"
        assert meter.grad_norm > 0.5, "logged as it was before"
        for name, p in mine.items():
            p.grad = gradients[name]
        for group in plain.param_groups:
            group["lr"] = config.optim.lr * rate(step, config)
        plain.step()
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(mine[name])
        parts.generators.student.sync_weights(step + 1)
    model = train(config, quiet=True).model
    final = load_file(model / "model.safetensors")
    for name, tensor in final.items():
        torch.testing.assert_close(tensor, mine[name].detach(), rtol=1e-5, atol=1e-6)


# Schedules by hand.


@pytest.mark.parametrize(
    ("schedule", "floor", "expected"),
    [
        ("constant", 0.0, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", 0.2, [1 / 3, 2 / 3, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        (
            "cosine",
            0.0,
            [1 / 3, 2 / 3, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060],
        ),
    ],
)
def test_schedules(schedule: str, floor: float, expected: list[float], tiny: Tiny) -> None:
    config = tiny(optim__steps=10, optim__warmup=0.2, optim__schedule=schedule, optim__min_lr_ratio=floor)
    assert [rate(step, config) for step in range(10)] == pytest.approx(expected, abs=1e-6)


def test_a_single_step_has_the_peak(tiny: Tiny) -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert rate(0, tiny(optim__steps=1, optim__warmup=0.5, optim__schedule=schedule)) == 1.0


def test_the_logged_rate_is_the_one_used(tiny: Tiny) -> None:
    config = tiny(optim__steps=4, optim__warmup=0.25, optim__schedule="linear", data__eval={})
    train(config, quiet=True)
    assert [row["lr"] for row in metrics(config)] == pytest.approx([0.5e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])


def test_norms_and_biases_are_not_decayed(tiny: Tiny) -> None:
    parts = assemble(tiny(optim__weight_decay=0.1))
    optimizer, _ = make_optimizer(parts.config, parts.models.student)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in parts.models.student.named_parameters():
        assert decay[id(p)] == (0.0 if "norm" in name else 0.1), name


# What is saved.


def logits(model: Any, ids: list[int]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


IDS = [1, 10, 14, 12, 3, 9, 5, 2]


def test_the_final_model_loads_in_plain_transformers(tiny: Tiny) -> None:
    config = tiny(data__eval={})
    parts = assemble(config)
    run = open_run(config, parts)
    optimise(parts, run, quiet=True)
    target = run.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(logits(loaded, IDS), logits(parts.models.student, IDS))
    assert not torch.equal(logits(loaded, IDS), logits(assemble(config).models.student, IDS)), (
        "it has learnt nothing"
    )
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert not list(run.directory.rglob("*.bin"))
    assert not list(run.directory.rglob("*.pt")), "nothing that could run code"


def test_an_adapter_and_its_merged_model_load_elsewhere(tiny: Tiny) -> None:
    config = tiny(student__lora_rank=4, student__lora_alpha=32, student__lora_merge=True, optim__lr=1e-2)
    parts = assemble(config)
    start = logits(parts.models.student, IDS)
    run = open_run(config, parts)
    optimise(parts, run, quiet=True)
    expected = logits(parts.models.student, IDS)
    target = run.save_model()
    assert (target / "adapter_model.safetensors").stat().st_size < 200_000
    assert not (target / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(config.student.model)
    with quietly():
        adapted = PeftModel.from_pretrained(base, target)
    assert torch.equal(logits(adapted, IDS), expected)
    merged = AutoModelForCausalLM.from_pretrained(run.directory / "merged")
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-4)
    assert (expected - start).abs().max() > 0.01, "an adapter that does nothing would pass"
    torch.testing.assert_close(
        logits(parts.models.student, IDS), expected
    )  # saving leaves the model as it was


def test_a_saved_adapter_is_a_student_again(tiny: Tiny, tmp_path: Path) -> None:
    first = tiny(data__eval={}, student__lora_rank=4)
    model = train(first, quiet=True).model
    again = tiny(run__name="again", data__eval={}, student__model=str(model))
    base = AutoModelForCausalLM.from_pretrained(first.student.model)
    with quietly():
        expected = logits(PeftModel.from_pretrained(base, model), IDS)
    torch.testing.assert_close(logits(assemble(again).models.student, IDS), expected, rtol=1e-4, atol=1e-4)


def test_only_the_adapter_trains(tiny: Tiny) -> None:
    config = tiny(data__eval={}, student__lora_rank=4)
    parts = assemble(config)
    before = {n: p.detach().clone() for n, p in parts.models.student.named_parameters()}
    optimise(parts, open_run(config, parts), quiet=True)
    moved = {n for n, p in parts.models.student.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_the_result_and_the_files_of_a_run(tiny: Tiny) -> None:
    config = tiny(run__trajectories_every=1, eval__start=True, eval__every=2)
    result = onpath.train(config, quiet=True)
    assert result.steps == 3
    assert [e["step"] for e in result.evaluations] == [3]
    assert [(e["step"], e["split"]) for e in read_lines(result.directory / "eval.jsonl")] == [
        (0, "test"), (2, "test"), (3, "test"),
    ]  # fmt: skip
    rows = metrics(config)
    assert [(r["step"], r["policy_version"]) for r in rows] == [(1, 1), (2, 2), (3, 3)]
    assert all(set(r["seconds"]) >= {"sample", "correct", "score", "train", "sync"} for r in rows)
    assert all(r["tokens"] == r["student_tokens_generated"] for r in rows)
    assert len(list((result.directory / "trajectories").glob("*.parquet"))) == 3
    assert json.loads((result.directory / "environment.json").read_text())["packages"]["torch"]


# Precision and memory.


def quick(tiny: Tiny, name: str, **options: Any) -> list[dict[str, Any]]:
    config = tiny(run__name=name, data__eval={}, **options)
    train(config, quiet=True)
    return metrics(config)


@pytest.mark.parametrize("lora", [0, 4])
def test_gradient_checkpointing_changes_nothing(lora: int, tiny: Tiny) -> None:
    runs = []
    for checkpointing in (False, True):
        config = tiny(
            run__name=f"checkpointing {checkpointing}",
            student__gradient_checkpointing=checkpointing,
            student__lora_rank=lora,
            data__eval={},
        )
        parts = assemble(config)
        assert (
            bool(getattr(unwrapped(parts.models.student).model, "gradient_checkpointing", False))
            == checkpointing
        )
        meter, gradients = step_on(parts, rollouts_of(parts))
        runs.append((meter.row(parts.models.device)["loss"], flat(gradients)))
        train(config, quiet=True)
        runs[-1] += (metrics(config)[-1]["loss"],)
    (loss, gradient, last), (loss2, gradient2, last2) = runs
    assert loss2 == pytest.approx(loss, rel=1e-6)
    assert last2 == pytest.approx(last, rel=1e-5)
    torch.testing.assert_close(gradient2, gradient, rtol=1e-5, atol=1e-7)
    assert gradient.norm() > 1e-3


def test_bf16_is_near(tiny: Tiny) -> None:
    exact = assemble(tiny(data__eval={}, optim__max_grad_norm=1e9))
    half = assemble(tiny(data__eval={}, optim__max_grad_norm=1e9, optim__bf16=True))
    made = rollouts_of(exact)
    (a, ga), (b, gb) = step_on(exact, made), step_on(half, made)
    assert b.row(half.models.device)["loss"] == pytest.approx(a.row(exact.models.device)["loss"], rel=0.02)
    assert torch.nn.functional.cosine_similarity(flat(ga), flat(gb), dim=0) > 0.99
    assert not torch.equal(flat(ga), flat(gb)), "autocast was off"
    assert all(p.dtype == torch.float32 for p in half.models.student.parameters())


def test_the_heads_products_know_of_bf16(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU autocast decides what a float32 head multiplies in; the sums over the vocabulary stay out of
    it, on any device."""
    seen: list[tuple[str, bool]] = []

    def spy(name: str, module: Any, call: str) -> None:
        inner = getattr(module, call)

        def spied(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, torch.is_autocast_enabled("cpu")))
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, call, spied)

    spy("products", head_module, "product_dtype")
    spy("sums", rows_module, "measure")
    for bf16 in (True, False):
        parts = assemble(tiny(data__eval={}, method__name="topd", optim__bf16=bf16))
        seen.clear()
        step_on(parts, rollouts_of(parts))
        assert set(seen) == {("products", bf16), ("sums", False)}


def test_a_bf16_run_trains(tiny: Tiny) -> None:
    rows = quick(tiny, "bf16", optim__bf16=True)
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rows)


# Vocabularies wider than the tokenizer.


def test_padding_rows_of_the_vocabulary_take_no_part(tiny: Tiny, tmp_path: Path) -> None:
    """The same models with more rows, whose weights are loud: the same run."""
    wide: dict[str, str] = {}
    for name, model, extra in (
        ("student", make_model(0, tied=False), 16),
        ("teacher", make_model(1, hidden=48, tied=False), 32),
    ):
        for rows, where in ((0, tmp_path / name), (extra, tmp_path / f"wide {name}")):
            grown = make_model(
                9, hidden=model.config.hidden_size, vocabulary=len(CHARACTERS) + rows, tied=False
            )
            state = {k: v.clone() for k, v in model.state_dict().items()}
            for key in ("lm_head.weight", "model.embed_tokens.weight"):
                loud = 5 * grown.state_dict()[key][len(CHARACTERS) :]
                state[key] = torch.cat([state[key], loud])
            grown.load_state_dict(state)
            grown.save_pretrained(where)
            make_tokenizer().save_pretrained(where)
            wide[where.name] = str(where)
    runs = []
    for prefix in ("", "wide "):
        config = tiny(
            run__name=f"{prefix}run",
            student__model=wide[f"{prefix}student"],
            teacher__model=wide[f"{prefix}teacher"],
            data__eval={},
        )
        model = train(config, quiet=True).model
        runs.append((metrics(config), load_file(model / "model.safetensors")))
    (rows, weights), (wide_rows, wide_weights) = runs
    for a, b in zip(rows, wide_rows, strict=True):
        for key in ("loss", "reverse_kl_nats", "grad_norm", "tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    head = wide_weights["lm_head.weight"]
    torch.testing.assert_close(head[: len(CHARACTERS)], weights["lm_head.weight"], rtol=1e-5, atol=1e-6)
    start = load_file(Path(wide["wide student"]) / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head[len(CHARACTERS) :], start[len(CHARACTERS) :]), "no gradient reaches padding"


# On-policy is a contract.


@pytest.mark.parametrize(
    "options", [{"rollout__temperature": 0.7}, {"rollout__top_p": 0.9}, {"rollout__top_k": 20}], ids=str
)
def test_tempered_and_truncated_rollouts_are_refused(options: dict[str, Any], tiny: Tiny) -> None:
    with pytest.raises(UserError, match="assumes untruncated samples of the student"):
        tiny(**options)
    assert tiny(method__off_policy=True, **options).method.off_policy
    with pytest.raises(UserError, match="assumes untruncated samples"):
        tiny(method__off_policy=True, method__divergence="sampled", **options)


def test_rollouts_are_the_students_of_that_step(tiny: Tiny) -> None:
    """Each step's rollouts come from the weights of that step, and say so."""
    config = tiny(data__eval={}, optim__lr=1e-2)
    parts = assemble(config)
    start = sample(parts, 1)
    assert {r.policy_version for r in start} == {0}
    optimise(parts, open_run(config, parts), quiet=True)
    later = sample(parts, 1)
    assert {r.policy_version for r in later} == {3}
    assert [r.prompt.id for r in later] == [r.prompt.id for r in start]
    assert [r.ids for r in later] != [r.ids for r in start]
    assert [r.ids for r in sample(parts, 2)] != [r.ids for r in later]


# The self-taught teacher's weights.


def test_a_moving_average_is_saved_and_restored_exactly(tiny: Tiny) -> None:
    config = tiny(
        method__name="opsd", method__weights="ema", method__ema_decay=0.6, method__diagnose_every=0,
        data__eval={}, optim__lr=1e-2, run__save_every=2,
    )  # fmt: skip
    parts = assemble(config)
    run = open_run(config, parts)
    optimise(parts, run, quiet=True)
    average = {n: p.clone() for n, p in parts.models.teacher.model.named_parameters()}
    weights = dict(parts.models.student.named_parameters())
    assert not any(torch.equal(average[n], weights[n]) for n in average)
    fresh = assemble(config)
    optimizer, _ = make_optimizer(fresh.config, fresh.models.student)
    loaded = checkpoint.load(
        run.directory / "checkpoints",
        model=fresh.models.student,
        optimizer=optimizer,
        extra=fresh.models.teacher.state(),
    )
    assert loaded is not None
    assert loaded.step == 3
    restored = dict(fresh.models.teacher.model.named_parameters())
    assert all(torch.equal(restored[n], average[n]) for n in average)
    assert all(torch.equal(p, weights[n]) for n, p in fresh.models.student.named_parameters())
    resumed = assemble(config)
    assert not torch.equal(next(resumed.models.teacher.model.parameters()), next(iter(average.values())))


def test_methods_with_two_contexts_train_on_both(tiny: Tiny) -> None:
    """OPSD with live weights: the teacher is the student, so only the second context makes a loss."""
    options = {"method__name": "opsd", "method__weights": "live", "method__entry_clip": None}
    parts = assemble(tiny(method__diagnose_every=0, optim__max_grad_norm=1e9, **options))
    made = rollouts_of(parts)
    assert all(len(t.teacher_context) > len(t.student_context) for t in made)
    meter, gradients = step_on(parts, made)
    assert meter.row(parts.models.device)["loss"] > 0.05
    assert flat(gradients).norm() > 0.05
    same = [replace(t, teacher_context=t.student_context) for t in made]
    meter, gradients = step_on(parts, same)
    assert abs(meter.row(parts.models.device)["loss"]) < 1e-6
    assert flat(gradients).norm() < 1e-5


def test_a_step_without_tokens_measures_no_divergence(tiny: Tiny) -> None:
    """Nothing kept: the averages are null in metrics.jsonl, not a perfect 0."""
    parts = assemble(tiny())
    made = rollouts_of(parts)
    dropped = [replace(t, edit=Edit(kind="none", kept=False, reason="test")) for t in made]
    meter, gradients = step_on(parts, dropped)
    row = meter.row(parts.models.device)
    assert row["tokens"] == 0
    assert row["reverse_kl_nats"] is None
    assert row["student_entropy_nats"] is None
    assert not gradients, "no optimiser step"
    assert step_on(parts, made)[0].row(parts.models.device)["reverse_kl_nats"] > 0


def test_two_runs_in_one_directory(tiny: Callable[..., Config]) -> None:
    config = tiny()
    directory = Path(config.run.dir) / config.run.name
    directory.mkdir(parents=True)
    held = os.open(directory, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is at work on this run"):
        train(config, quiet=True)
    assert list(directory.iterdir()) == []
    os.close(held)
    assert train(config, quiet=True).steps == 3
    assert train(config, quiet=True).steps == 3, "the lock is given back"


def test_a_run_that_keeps_nothing_says_so(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Neither at once nor when it is started again does it end as if it had trained."""
    low = {"low": {"name": f"{tmp_path / 'low.py'}:low", "at_least": 1.0}}
    (tmp_path / "low.py").write_text("def low(text):\n    return 0.0\n")
    with code.allowed():
        tree = {**tiny(run__save_every=1).model_dump(mode="json"), "rewards": low}
        config = configuration.build(tree)
        for _ in range(2):
            with pytest.raises(UserError, match="in none of 3 steps was a token trained on"):
                train(config, quiet=True)
    assert not (Path(config.run.dir) / config.run.name / "model").exists()


def test_an_empty_model_directory_is_no_finished_run(tiny: Callable[..., Config]) -> None:
    config = tiny(run__save_every=1)
    done = train(config, quiet=True)
    shutil.rmtree(done.model)
    done.model.mkdir()
    again = train(config, quiet=True)
    assert (again.model / "config.json").is_file()


def test_further_temperatures_are_evaluations_of_their_own(tiny: Callable[..., Config]) -> None:
    run = train(tiny(optim__steps=1, eval__also_at=[0.5, 0]), quiet=True).directory
    lines = {row["split"]: row for row in read_lines(run / "eval.jsonl")}
    asked = {name: (row["n"], row["k"], row["sampling"]["temperature"]) for name, row in lines.items()}
    assert asked == {"test": (2, 2, 1.0), "test_T0.5": (2, 2, 0.5), "test_greedy": (1, 1, 0.0)}
    assert {row["problems"] for row in lines.values()} == {5}
    assert all((run / "evals" / f"{name}_step_000001.jsonl").is_file() for name in asked)


def test_the_first_step_says_what_both_models_have_in_common(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against full logits of both models, in a plain loop over the stored trajectories' tokens."""
    config = tiny(data__eval={}, run__trajectories_every=1, optim__steps=2)
    parts = assemble(config)
    models = parts.models.student.eval(), parts.models.teacher.model
    shares = []
    for t in parts.method.prepare(sample(parts, 0), step=0).trajectories:
        ids = torch.tensor([t.student_context + t.response])
        with torch.no_grad():
            one, two = (
                m(ids).logits[0, len(t.student_context) - 1 : -1, : parts.models.vocabulary] for m in models
            )
        for a, b in zip(one.topk(5).indices.tolist(), two.topk(5).indices.tolist(), strict=True):
            shares.append(len({*a} & {*b}) / 5)
    train(config)
    first = metrics(config)[0]["top_overlap"]
    assert first == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert 0 < first < 1
    assert capsys.readouterr().err.count(f"{first:.0%} are the same at the start") == 1


def test_prompts_that_the_tokenizer_cannot_read_are_said(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gym's has letters, digits and signs alone."""
    models = {"student__model": "gym:student", "teacher__model": "gym:teacher", "optim__steps": 1}
    for strange in (3, 0):
        rows = [{"prompt": f"{i} + 2?" + "ß" * (i < strange), "answer": "1"} for i in range(8)]
        path = tmp_path / f"{strange}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"data__train": str(path), "data__eval": {"few": str(path)}, "run__name": f"of-{strange}"}
        train(tiny(**models, **options))
        said = " ".join(capsys.readouterr().err.split())
        assert ("3 of 8 prompts of data.train hold the unknown token" in said) == bool(strange)
        assert ("prompts of data.eval.few hold the unknown token" in said) == bool(strange)


def test_problems_that_are_trained_on_are_said(
    tiny: Callable[..., Config], data_file: Path, tmp_path: Path
) -> None:
    """Of a set that is cut to five all are; of other problems none."""
    said = "5 of 5 evaluation problems are also training prompts: accuracy on them is no test"
    assert said in assemble(tiny()).warnings
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "nobody asked this", "answer": "1"}\n')
    assert not any("training prompts" in w for w in assemble(tiny(data__eval={"test": str(other)})).warnings)


def test_a_quiet_run_says_how_many_rows_it_skipped(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was left out changes what is trained: it is never silent (`data.skip_bad`)."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1=?", "answer": "2"}\n' * 4 + '{"prompt": 5}\n')
    options = {"data__train": str(path), "data__eval": {}, "optim__steps": 1, "rollout__prompts": 2}
    train(tiny(**options, data__skip_bad=True), quiet=True)
    assert "1 bad rows of" in capsys.readouterr().err


def test_a_teacher_need_not_have_room_for_evaluations(
    tiny: Callable[..., Config], model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    plain = assemble(tiny())
    room = max(len(plain.text.renderer.ids(p)) for p in plain.prompts.pool) + 12
    shutil.copytree(model_dirs["teacher"], tmp_path / "teacher")
    told = json.loads((tmp_path / "teacher/config.json").read_text())
    (tmp_path / "teacher/config.json").write_text(json.dumps({**told, "max_position_embeddings": room}))
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "1+" * room + "1=?", "answer": "1"}) + "\n")
    config = tiny(teacher__model=str(tmp_path / "teacher"), data__eval={"long": str(tmp_path / "long.jsonl")})
    assert assemble(config).models.teacher.context_length == room
    with pytest.raises(UserError, match=f"context of {room} tokens is too short"):
        assemble(
            config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_new_tokens": 13})})
        )
