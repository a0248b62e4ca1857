"""What is said of a student before the first step."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from onpath.config.whole import Config
from onpath.engines.student import sampling_warning, scale_warning
from onpath.run.assemble import assemble

Tiny = Callable[..., Config]


def of_size(billions: float) -> nn.Module:
    return nn.Linear(1000, round(billions * 1e6), bias=False, device="meta")


@pytest.mark.parametrize(
    ("billions", "options", "said"),
    [
        (1.7, {"rollout__max_new_tokens": 4096}, True),
        (1.7, {"rollout__max_new_tokens": 256}, False),
        (0.6, {"rollout__max_new_tokens": 4096}, False),
        (1.7, {"rollout__max_new_tokens": 4096, "rollout__engine": "vllm"}, False),
    ],
)
def test_a_large_student_that_writes_long_rollouts_itself_is_warned_of(
    billions: float, options: dict[str, Any], said: bool, tiny: Tiny
) -> None:
    warning = sampling_warning(tiny(**options), of_size(billions))
    assert (warning is not None) == said
    if warning:
        assert "1.7B weights" in warning
        assert "4,096 times" in warning
        assert "rollout.engine: vllm" in warning


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"student__lora_rank": 4}, True),
        ({"student__lora_rank": 64}, False),
        ({"student__lora_rank": 4, "student__lora_alpha": 128.0}, False),
        ({}, False),
    ],
)
def test_an_adapter_that_acts_many_times_by_default_is_warned_of(
    options: dict[str, Any], said: bool, tiny: Tiny
) -> None:
    assert (scale_warning(tiny(**options)) is not None) == said


def test_such_warnings_are_a_run_s(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onpath.engines.student._SMALL", 10)
    monkeypatch.setattr("onpath.engines.student._SHORT", 1)
    found = assemble(tiny(student__lora_rank=4)).warnings
    assert [w.split()[0] for w in found if "weights of the student" in w or "acts" in w] == [
        "student.lora_alpha",
        "rollout.engine:",
    ]
