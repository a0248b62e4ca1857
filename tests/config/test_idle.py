"""Options that are set and have no effect are said, and every mark of one names what there is."""

from collections.abc import Callable
from typing import Any

import pytest

from onpath.config.build import build
from onpath.config.idle import idle_alone, idle_options
from onpath.config.methods import METHODS
from onpath.config.section import GoesWith, Section
from onpath.config.sections import Data, Eval, Optim, Parallel, RolloutSection, Run, Student, Teacher
from onpath.config.whole import Config
from onpath.run.assemble import assemble
from onpath.training import train

SECTIONS: list[type[Section]] = [
    *METHODS.values(),
    *(Data, Eval, Optim, Parallel, RolloutSection, Run, Student, Teacher),
]


OPSD: dict[str, Any] = {"method": {"name": "opsd"}}
SERVED: dict[str, Any] = {
    "method": {"support": "teacher_topk"},
    "teacher": {"engine": "vllm", "url": "http://x"},
}
UNGUIDED: dict[str, Any] = {"guide": False, "suppress": "low"}
VLLM: dict[str, Any] = {"engine": "vllm"}


def topd(**options: Any) -> dict[str, Any]:
    return {"method": {"name": "topd", **options}}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_mark_names_an_option_and_its_values(section: type[Section]) -> None:
    for info in section.model_fields.values():
        for mark in info.metadata:
            if isinstance(mark, GoesWith):
                assert mark.option in section.model_fields
                for value in mark.values:
                    section.__pydantic_validator__.validate_assignment(
                        section.model_construct(), mark.option, value
                    )


@pytest.mark.parametrize(
    ("given", "key", "needs"),
    [
        ({"method": {"support_k": 8}}, "method.support_k", "method.support: teacher_topk or "),
        ({"method": {"beta": 0.3}}, "method.beta", "method.divergence: jensen_shannon"),
        ({"method": {"name": "truncate", "share": 0.2}}, "method.share", "method.stop_when: share"),
        ({"method": {"name": "trd", "weights": "ema"}}, "method.weights", "method.teacher: self"),
        ({"student": {"lora_alpha": 8}}, "student.lora_alpha", "student.lora_rank"),
        ({"student": {"lora_dropout": 0.1, "lora_rank": 4}}, "student.lora_dropout", "student.dropout"),
        ({"teacher": {"cache_gb": 3}}, "teacher.cache_gb", "teacher.cache"),
        ({"optim": {"schedule": "constant", "min_lr_ratio": 0.1}}, "optim.min_lr_ratio", "optim.schedule: c"),
        (OPSD | {"teacher": {"model": "./other"}}, "teacher.model", "another model as the teacher"),
        (OPSD | {"teacher": {"dtype": "bfloat16"}}, "teacher.dtype", "another model as the teacher"),
        (OPSD | {"teacher": {"device": "cpu"}}, "teacher.device", "another model as the teacher"),
        (
            SERVED | {"teacher": {**SERVED["teacher"], "dtype": "bfloat16"}},
            "teacher.dtype",
            "teacher.engine: hf",
        ),
        (
            SERVED | {"teacher": {**SERVED["teacher"], "device": "cpu"}},
            "teacher.device",
            "teacher.engine: hf",
        ),
        (
            {"rollout": {**VLLM, "url": "http://x", "vllm": {"seed": 1}}},
            "rollout.vllm",
            "a vLLM in this process",
        ),
        ({"rollout": {**VLLM, "batch_tokens": 9}}, "rollout.batch_tokens", "generation by models in this"),
        (OPSD | {"rollout": {**VLLM, "batch_tokens": 9}}, "rollout.batch_tokens", "generation by models in"),
        (topd(plan="spliced", guidance_weight=5.0), "method.guidance_weight", "method.plan: transport or "),
        (topd(plan="spliced", guidance_weight="auto"), "method.guidance_weight", "method.plan: transport or"),
        (topd(plan="spliced", ratio_every=1), "method.ratio_every", "method.plan: transport or "),
        (topd(plan="spliced", record_above=0.2), "method.record_above", "method.plan: transport or "),
        (topd(plan="spliced", overlap="average"), "method.overlap", "method.plan: transport or shuffled or"),
        (topd(plan="teacher_window_ce", overlap="average"), "method.overlap", "method.plan: transport or"),
        (topd(**UNGUIDED, guidance_weight=5.0), "method.guidance_weight", "method.guide"),
        (topd(**UNGUIDED, mass="row"), "method.mass", "method.guide"),
        (topd(**UNGUIDED, epsilon=0.5), "method.epsilon", "method.guide"),
        (topd(**UNGUIDED, plan="spliced"), "method.plan", "method.guide"),
        (topd(**UNGUIDED, overlap="average"), "method.overlap", "method.guide"),
        (topd(decide="all_high_loss", student_window="regenerate"), "method.student_window", "method.decide"),
        (topd(decide="all_high_loss", suppress="low"), "method.suppress", "method.decide: quantile or "),
        (topd(decide="random_positions", candidates="teacher_nll"), "method.candidates", "method.decide: q"),
        (
            topd(decide="sampled_gap", plan="positional", embedding="teacher"),
            "method.embedding",
            "method.decide: quantile or threshold or",
        ),
        (
            {"method": {"name": "branch", "control": "random_place", "place": "sampled_gap"}},
            "method.place",
            "method.control: none or own_token",
        ),
        *(
            (
                {"method": {"name": "bridge", "control": "own_token", name: 3}},
                f"method.{name}",
                "method.control: none or random_place",
            )
            for name in ("meet_window", "meet_distance", "every")
        ),
        (
            {"method": {"name": "opsd", "shown": "none", "template": "{problem} {solution}"}},
            "method.template",
            "method.shown: own or foreign or wrong or contrast",
        ),
        (
            {"method": {"name": "trd", "rewrite_temperature": 0, "rewrite_top_p": 0.9}},
            "method.rewrite_top_p",
            "method.rewrite_temperature above 0",
        ),
        (
            {"method": {"name": "trd", "rewrite_temperature": 0, "best_of": 4}},
            "method.best_of",
            "method.rewrite_temperature above 0",
        ),
        ({"method": {"name": "truncate", "least_weight": 0.3}}, "method.least_weight", "method.decay above"),
        ({"eval": {"temperature": 0, "top_p": 0.9}}, "eval.top_p", "eval.temperature above 0"),
        (
            {"method": {"off_policy": True}, "rollout": {"temperature": 0, "top_k": 5}},
            "rollout.top_k",
            "rollout.temperature above 0",
        ),
        *(
            ({section: {name: 3}}, f"{section}.{name}", f"{section}.url")
            for section in ("rollout", "teacher")
            for name in ("timeout", "patience", "concurrency")
        ),
        ({"parallel": {"hosts": 2}}, "parallel.hosts", "parallel.shard: layer or step"),
        ({"parallel": {"teacher": "copy"}}, "parallel.teacher", "parallel.shard: layer or step"),
    ],
)
def test_what_has_no_effect_is_named(given: dict[str, Any], key: str, needs: str) -> None:
    assert [*idle_options(build(given))] == [key]
    assert idle_options(build(given))[key].startswith(needs)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_not_idle(name: str) -> None:
    assert not idle_options(build({"method": {"name": name}}))


@pytest.mark.parametrize(
    "given",
    [
        {"method": {"support_k": 8, "support": "teacher_topk"}},
        {"method": {"beta": 0.3, "divergence": "jensen_shannon"}},
        {
            "method": {"support_k": 8, "divergence": "sampled"},
            "teacher": {"engine": "vllm", "url": "http://x"},
        },
        {"student": {"lora_alpha": 8, "lora_rank": 2}},
        topd(plan="spliced", splice="end", overlap="suppress"),
        topd(plan="teacher_window_ce", guidance_weight=5.0, ratio_every=2),
        topd(**UNGUIDED, student_window="regenerate", overlap="suppress", embedding="teacher"),
        topd(decide="all_high_loss", overlap="suppress", student_window="regenerate"),
        topd(decide="all_high_loss", embedding="teacher", epsilon=0.1, mass="row"),
        {"method": {"name": "branch", "control": "own_token", "place": "sampled_gap"}},
        {"method": {"name": "bridge", "control": "random_place", "every": 2, "meet_distance": 0.2}},
        {"method": {"name": "trd", "gate": False, "gate_prompts": 8}},  # onpath doctor asks all the same
        {
            "method": {"name": "trd", "rewrite_temperature": 0, "best_of": 2, "divergence": "cross_entropy"},
            "teacher": {"engine": "chat", "url": "http://x", "timeout": 9, "concurrency": 2},
        },
        {"method": {"name": "truncate", "least_weight": 0.3, "decay": 0.5}},
        {"eval": {"temperature": 0, "top_p": 0.9, "also_at": [0.7]}},
        {"rollout": {**VLLM, "vllm": {"seed": 1}}},
        {"rollout": {**VLLM, "batch_tokens": 9}, "method": {"name": "trd"}},
        {"rollout": {**VLLM, "batch_tokens": 9}, "method": {"name": "trd", "teacher": "self"}},
        {"rollout": {"batch_tokens": 9}, **SERVED},
        {"rollout": {**VLLM, "url": "http://x", "timeout": 9, "patience": 9, "concurrency": 9}},
        {"teacher": {"model": "gym:persona", "dtype": "bfloat16", "device": "cpu"}},
        {"parallel": {"shard": "step", "hosts": 2, "teacher": "copy", "balance": False}},
    ],
)
def test_what_has_an_effect_is_not(given: dict[str, Any]) -> None:
    assert not idle_options(build(given))


def test_a_run_says_so(tiny: Callable[..., Config]) -> None:
    said = assemble(tiny(method__beta=0.3)).warnings
    assert "method.beta has no effect here: it goes with method.divergence: jensen_shannon" in said


def test_options_of_several_processes_are_said_in_one(
    tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(parallel__shard="step", parallel__balance=False, optim__steps=1, data__eval={})
    assert idle_alone(config) == ["parallel.shard", "parallel.balance"]
    assert idle_alone(build({"parallel": {"teacher": "copy"}})) == []
    assert idle_alone(build({"parallel": {"teacher": "copy", "shard": "layer", "hosts": 2}})) == [
        "parallel.shard",
        "parallel.hosts",
        "parallel.teacher",
    ]
    train(config)
    said = capsys.readouterr().err
    for key in ("parallel.shard", "parallel.balance"):
        assert f"warning: {key} has no effect here: it goes with several processes" in said


def test_a_student_that_is_its_own_teacher_needs_no_other_of_its_language() -> None:
    build({"method": {"name": "opsd"}, "data": {"train": "maze:train"}, "student": {"model": "maze:student"}})
