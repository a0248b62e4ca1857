"""Quantised weights, as transformers' own configs ask for them: a teacher, and the base of an adapter.

What needs a library is tried where that is installed (`pip install torchao`); refusals always.
"""

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from onpath.config.whole import Config
from onpath.run.assemble import assemble
from onpath.system.errors import UserError

Tiny = Callable[..., Config]
INT8: dict[str, Any] = {
    "quant_method": "torchao",
    "quant_type": {
        "default": {
            "_type": "Int8WeightOnlyConfig",
            "_version": 2,
            "_data": {"granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}},
        }
    },
}
BITS: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"student__quantization": BITS}, "set student.lora_rank"),
        ({"student__quantization": BITS, "student__lora_rank": 4, "student__lora_merge": True}, "lora_merge"),
        (
            {"student__quantization": BITS, "student__lora_rank": 4, "rollout__overlap": True},
            "not rollout.over",
        ),
        ({"teacher__quantization": BITS, "parallel__shard": "layer"}, r"set parallel\.shard: none"),
        ({"teacher__quantization": BITS, "method__name": "opsd"}, r"use student\.quantization"),
        (
            {
                "student__quantization": BITS,
                "student__lora_rank": 4,
                "method__name": "opsd",
                "method__weights": "ema",
            },
            "not weights: ema",
        ),
    ],
)
def test_impossible_pairs(options: dict[str, Any], says: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=says):
        tiny(**options)


@pytest.mark.parametrize("given", [{"quant_method": "magic"}, {"a": 1}])
def test_what_transformers_does_not_know(given: dict[str, Any], tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"^teacher\.quantization: .*transformers' quantisation configs"):
        assemble(tiny(teacher__quantization=given))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_a_library_that_is_missing_is_named(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"^teacher\.model: .*bitsandbytes"):
        assemble(tiny(teacher__quantization=BITS))


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_teacher_and_base(tiny: Tiny) -> None:
    """Near to what they are unquantised, and not the same; what is exported is the base as it is."""
    import onpath
    from onpath.commands.doctor.command import diagnose
    from onpath.run.log import read_lines
    from onpath.training import train

    def rows(**options: Any) -> list[dict[str, Any]]:
        return read_lines(train(tiny(data__eval={}, **options), quiet=True).directory / "metrics.jsonl")

    for options in ({"teacher__quantization": INT8}, {"student__quantization": INT8}):
        lora = {"student__lora_rank": 4}
        plain, quantised = rows(**lora, run__name="plain"), rows(**lora, **options, run__name="quantised")
        assert quantised[0]["loss"] != plain[0]["loss"]
        assert quantised[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.1)
        run = tiny(run__name="quantised").run
        assert onpath.export_model(f"{run.dir}/{run.name}", f"{run.dir}/{next(iter(options))}").is_dir()
        shutil.rmtree(run.dir)
    found = {f.name: f for f in diagnose(tiny(teacher__quantization=INT8))}
    assert 0 < found["teacher_differs"].values["quantised_kl_nats"] < 0.1
