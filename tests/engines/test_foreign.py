"""Model directories that somebody else made: refused in a sentence before anything is opened, or whole."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from onpath.config.sections import Student
from onpath.engines import foreign
from onpath.engines.models import load_model, quietly
from onpath.system.errors import UserError
from tests.conftest import make_model
from tests.mutate import mutated

Spoil = Callable[[Path], None]


def load(directory: Path) -> Any:
    return load_model(Student(model=str(directory)), "student.model", torch.device("cpu"))


@pytest.fixture
def model(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dirs["student"], tmp_path / "model"))


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    with quietly():
        adapted = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        adapted.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    told = {**json.loads(config.read_text()), "base_model_name_or_path": str(model)}
    config.write_text(json.dumps(told))
    return tmp_path / "adapter"


def in_index(name: str) -> Spoil:
    def spoil(directory: Path) -> None:
        names = load_file(directory / "model.safetensors")
        weight_map = dict.fromkeys(names, "model.safetensors") | {next(iter(names)): name}
        (directory / foreign._INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (directory / "evil.bin").write_bytes(b"cos\\nsystem\\n")

    return spoil


def only_pickle(stem: str) -> Spoil:
    def spoil(directory: Path) -> None:
        (directory / f"{stem}.safetensors").unlink()
        torch.save({}, directory / f"{stem}.bin")

    return spoil


def told(**changes: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (in_index("evil.bin"), "names evil.bin; only .safetensors"),
        (in_index("../model/model.safetensors"), "only .safetensors files beside it"),
        (in_index("gone.safetensors"), "gone.safetensors, which is not there"),
        (only_pickle("model"), "a format that can run code"),
        (told(hidden_size=10**12), "hidden_size is 1000000000000, which is no size"),
        (told(num_hidden_layers="two"), "num_hidden_layers is 'two'"),
        (told(num_attention_heads=0), "num_attention_heads is 0"),
        (told(vocab_size=True), "vocab_size is True"),
        (lambda d: (d / "config.json").write_text("[1"), "config.json: damaged: not valid JSON"),
        (lambda d: (d / "config.json").write_text("null"), "NoneType in place of an object"),
    ],
)  # fmt: skip
def test_models_that_are_refused(
    spoil: Spoil, words: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(model)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(UserError, match=words):
        load(model)


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (only_pickle("adapter_model"), "a format that can run code"),
        (tensors(lambda t: dict(list(t.items())[::2])), "lacks 4 of the 8 tensors that its config"),
        (tensors(lambda t: {f"other.{k}": v for k, v in t.items()}), "lacks 8 of the 8 tensors"),
        (tensors(lambda t: {**t, "more.lora_A.weight": torch.ones(2, 2)}), "has 1 tensors that .* not"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\\xff" * 40), "is damaged"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "without adapter_model.safetensors"),
        (
            lambda d: (d / "adapter_config.json").write_text('{"base_model_name_or_path": "gym:student"}'),
            "peft_type is missing",
        ),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(
    spoil: Spoil, words: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(adapter)
    spoil(adapter)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(UserError, match=words):
        load(adapter)


def test_five_hundred_configs(model: Path, adapter: Path) -> None:
    """What is read before loading is a sentence or sound."""
    rng = random.Random(0)
    cases: list[tuple[Path, Callable[[Path, str], None]]] = [
        (model / "config.json", foreign.check_model),
        (adapter / "adapter_config.json", foreign.check_adapter),
    ]
    for path, check in cases:
        good = json.loads(path.read_text())
        said = []
        for _ in range(500):
            path.write_bytes(mutated(good, rng))
            try:
                check(path.parent, "student.model")
            except UserError as error:
                said.append(str(error))
        assert len(said) > 50
        assert max(map(len, said)) < 600


def test_thirty_configs_loaded(model: Path) -> None:
    """And whatever gets so far is loaded, or a sentence."""
    rng, path = random.Random(1), model / "config.json"
    good = json.loads(path.read_text())
    for _ in range(30):
        path.write_bytes(mutated(good, rng))
        try:
            load(model)
        except UserError as error:
            said = str(error)
            path.write_text(said)
