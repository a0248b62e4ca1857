"""Adapters as teachers: several on one base have its weights once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from onpath.commands.doctor.fits import step_of
from onpath.config.whole import Config
from onpath.engines.models import load_model, quietly, stays_beside
from onpath.engines.score_cache import weights_digest
from onpath.run.assemble import assemble
from onpath.run.contents import digests
from onpath.run.log import read_lines
from onpath.run.parts import Parts
from onpath.run.sampling import sample
from onpath.system.errors import UserError
from onpath.training import train
from tests.run.test_mixture import alone_and_by_two
from tests.run.test_routed import METHODS

Tiny = Callable[..., Config]
Options = dict[str, Any]


@pytest.fixture(scope="module")
def adapters(model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three LoRA adapters of the teacher that each do something; one is on the output layer as well."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, targets) in enumerate(
        {"math": ["q_proj", "v_proj"], "code": ["up_proj"], "ends": ["q_proj", "lm_head"]}.items()
    ):
        torch.manual_seed(seed)
        with quietly():
            base = AutoModelForCausalLM.from_pretrained(model_dirs["teacher"])
            model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
            found[name] = root / name
            model.save_pretrained(found[name], save_embedding_layers=False)
        told = json.loads((found[name] / "adapter_config.json").read_text())
        told["base_model_name_or_path"] = str(model_dirs["teacher"])
        (found[name] / "adapter_config.json").write_text(json.dumps(told))
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (found[name] / file).write_bytes((model_dirs["teacher"] / file).read_bytes())
    return found


@pytest.fixture
def on_one_base(two: Options, adapters: dict[str, Path]) -> Options:
    return {
        **two,
        **{f"teachers__{n}": {"model": str(adapters[n]), "device": "cpu"} for n in ("math", "code")},
    }


def test_the_base_is_there_once(
    tiny: Tiny, on_one_base: Options, model_dirs: dict[str, Path], adapters: dict[str, Path]
) -> None:
    options = {**on_one_base, "data__teacher_column": None}
    options["teachers__plain"] = {"model": str(model_dirs["teacher"]), "device": "cpu"}
    options["teachers__default"] = {"mixture": {"math": 1, "code": 1, "plain": 1}}
    del options["data__train"]
    parts = assemble(tiny(**options))
    models = [parts.models.teacher.of(name).model for name in ("math", "code", "plain")]
    assert all(model is not None for model in models)
    own = [{id(p) for p in model.parameters()} for model in models]  # type: ignore[union-attr]
    assert own[2] < own[0]
    assert own[2] < own[1]
    assert own[0] & own[1] == own[2]
    added = sum(p.numel() for m in models[:2] for n, p in m.named_parameters() if "lora_" in n)  # type: ignore[union-attr]
    step = step_of(parts, response_tokens=0)
    assert step.teacher is not None
    whole = step.teacher.bytes + step.more_teachers
    assert whole == 4 * (sum(p.numel() for p in models[2].parameters()) + added)  # type: ignore[union-attr]


def test_each_scores_as_it_would_merged(
    tiny: Tiny, on_one_base: Options, adapters: dict[str, Path], model_dirs: dict[str, Path]
) -> None:
    options = {**on_one_base, "teachers__code": {"model": str(adapters["ends"]), "device": "cpu"}}
    parts = assemble(tiny(**options))
    rollouts = sample(parts, 0)
    contexts, responses = [r.context for r in rollouts], [r.ids for r in rollouts]
    scored = {}
    for name, directory in (("math", adapters["math"]), ("code", adapters["ends"])):
        section = tiny(teacher__model=str(directory)).teacher
        alone = parts.generators.over(load_model(section, "teacher.model", torch.device("cpu")))
        scored[name] = parts.generators.teacher.of(name).score(contexts, responses)
        for row, expected in zip(scored[name], alone.score(contexts, responses), strict=True):
            assert row == pytest.approx(expected, abs=1e-4)
    assert scored["math"] != scored["code"]


@pytest.mark.parametrize("method", ["trd", "relay, side by side"])
def test_methods_learn_from_them(method: str, tiny: Tiny, on_one_base: Options) -> None:
    run = train(tiny(**{**on_one_base, **METHODS[method]}, optim__steps=2), quiet=True).directory
    for row in read_lines(run / "metrics.jsonl"):
        assert row["teachers"]["math"]["reverse_kl_nats"] > 0
        assert row["teachers"]["code"]["reverse_kl_nats"] > 0


def test_their_kept_scores_are_their_own(tiny: Tiny, on_one_base: Options, tmp_path: Path) -> None:
    kept = dict(on_one_base)
    for name in ("math", "code"):
        own = {"cache": str(tmp_path / "kept"), "cache_dtype": "float32"}
        kept[f"teachers__{name}"] = {**on_one_base[f"teachers__{name}"], **own}
    runs = [train(tiny(**o, run__name=n), quiet=True).directory for n, o in (("a", on_one_base), ("b", kept))]
    rows = [[row["loss"] for row in read_lines(run / "metrics.jsonl")] for run in runs]
    assert rows[0] == rows[1]


def test_two_processes_are_one(tiny: Tiny, on_one_base: Options, tmp_path: Path) -> None:
    """Each has shards of its own."""
    assert alone_and_by_two(tiny, on_one_base, tmp_path, shard="layer")


def test_one_that_is_damaged_is_said(tiny: Tiny, on_one_base: Options, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for file in Path(on_one_base["teachers__code"]["model"]).iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    (spoilt / "adapter_model.safetensors").write_bytes(b"half")
    options = {**on_one_base, "teachers__code": {"model": str(spoilt), "device": "cpu"}}
    with pytest.raises(UserError, match=r"teachers\.code\.model: .*damaged"):
        assemble(tiny(**options))


def changed(adapter: Path, to: Path, **told: Any) -> Path:
    """A copy with another config."""
    shutil.copytree(adapter, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    return to


def mixed(on_one_base: Options) -> Options:
    """All rows are taught by both."""
    both = {"mixture": {"math": 1, "code": 1}}
    options = {**on_one_base, "data__teacher_column": None, "teachers__default": both}
    del options["data__train"]
    return options


def scores_of(parts: Parts, name: str) -> list[tuple[float, ...]]:
    return parts.generators.teacher.of(name).score([(1, 5, 6), (1, 7)], [(4, 8), (9,)])


OTHER_KINDS: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"alora_invocation_tokens": [1, 2]},
    {"modules_to_save": ["lm_head"]},
    {"bias": "all"},
    {"peft_type": "IA3"},
]


def test_what_changes_the_base_is_merged(
    tiny: Tiny, on_one_base: Options, adapters: dict[str, Path], tmp_path: Path
) -> None:
    plain = adapters["math"]
    assert stays_beside(str(plain))
    for i, told in enumerate(OTHER_KINDS):
        assert not stays_beside(str(changed(plain, tmp_path / str(i), **told))), told
    whole = changed(plain, tmp_path / "whole")
    tensors = load_file(whole / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(48, 48)
    save_file(tensors, whole / "adapter_model.safetensors")
    assert not stays_beside(str(whole))

    options = mixed(on_one_base)
    expected = scores_of(assemble(tiny(**options)), "math")
    pissa = changed(adapters["code"], tmp_path / "pissa", init_lora_weights="pissa")
    options["teachers__code"] = {"model": str(pissa), "device": "cpu"}
    for row, was in zip(scores_of(assemble(tiny(**options)), "math"), expected, strict=True):
        assert row == pytest.approx(was, abs=1e-4)


def test_how_strongly_an_adapter_acts_is_part_of_what_it_is(
    tiny: Tiny, on_one_base: Options, adapters: dict[str, Path], tmp_path: Path
) -> None:
    louder = changed(adapters["math"], tmp_path / "louder", lora_alpha=64)
    options = {**mixed(on_one_base), "teachers__code": {"model": str(louder), "device": "cpu"}}
    parts = assemble(tiny(**options))
    math, code = (parts.models.teacher.of(name).model for name in ("math", "code"))
    assert math is not None
    assert code is not None
    assert scores_of(parts, "math") != scores_of(parts, "code")
    assert weights_digest(math, trained=False) != weights_digest(code, trained=False)
    found = digests(parts)
    assert found["teachers.math.model"] != found["teachers.code.model"]
