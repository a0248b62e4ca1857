"""Tiny random models and data, made anew in every test session: nothing is downloaded."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from onpath import config as config_module
from onpath.commands.study.plan import Job
from onpath.commands.study.worker import evaluate_untrained
from onpath.config.whole import Config
from onpath.engines.hf import HFEngine
from onpath.engines.self_check import Agreement, check_model
from onpath.engines.sharding import raw
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.training import train

CHARACTERS = ["<pad>", "<bos>", "<eos>", "<sol>", *"0123456789+-=?; abcdefghijklmnopqrstuvwxyz.:"]
TEMPLATE = (
    "<bos>{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<sol>{% endif %}"
)


def make_tokenizer(tokens: list[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character."""
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<sol>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(
    seed: int, *, hidden: int = 32, vocabulary: int = len(CHARACTERS), tied: bool = True
) -> Qwen3ForCausalLM:
    """Two random layers; logits spread enough that sampling, divergences and gradients have something to
    tell."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=hidden // 2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model.eval()


LONG = (
    "test_runs_are_those_of_one_process",
    "test_any_number_of_ranks_goes_on_where_any_number_stopped",
    "test_three_methods_side_by_side_from_the_start",
    "test_gradients_are_those_of_one_process",
    "test_two_runs_and_a_mistake_in_the_same_processes",
    "test_killed_and_continued_in_processes",
)
"""At the end they would keep one process busy while the others have nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first."""
    items.sort(key=lambda item: not item.name.startswith(LONG))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


AGREED: dict[tuple[object, ...], Agreement] = {}
"""Models that have passed the start-up check in this test process."""


@pytest.fixture(autouse=True)
def _models_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights pass the start-up check once: it is a third of a tiny run, and there are many hundreds
    of those. What the check finds is tested in engines/test_self_check.py, which calls it itself."""

    def check(model: torch.nn.Module, engine: HFEngine | None, *, key: str, **options: Any) -> Agreement:
        digest = blake2b(repr(model).encode())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for part in raw(tensor.detach().clone()):  # FSDP cannot free what numpy has looked at
                digest.update(part)
        # All ranks do it, or none: what one holds of a sharded model does not say what the others hold.
        known = (*distributed.gather([digest.hexdigest()]), engine is None, key, *options.items())
        if known not in AGREED:
            AGREED[known] = check_model(model, engine, key=key, **options)
        return AGREED[known]

    monkeypatch.setattr("onpath.run.assemble.check_model", check)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`student` and `teacher`: other weights and another width, one vocabulary."""
    root = tmp_path_factory.mktemp("models")
    dirs = {}
    for name, model in {"student": make_model(0), "teacher": make_model(1, hidden=48)}.items():
        dirs[name] = root / name
        model.save_pretrained(dirs[name])
        make_tokenizer().save_pretrained(dirs[name])
    return dirs


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty sums with answers and solutions; prompts of unequal length."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {
            "id": str(i),
            "prompt": f"{i}+{7 * i}=?",
            "answer": str(8 * i),
            "solution": f"{i} plus {7 * i} is {8 * i}",
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def tiny(model_dirs: dict[str, Path], data_file: Path, tmp_path: Path) -> Callable[..., Config]:
    """Builds a config over the tiny models; keyword `section__key=value` overrides."""

    def build(**overrides: Any) -> Config:
        data: dict[str, dict[str, Any]] = {
            "student": {"model": str(model_dirs["student"]), "device": "cpu"},
            "teacher": {"model": str(model_dirs["teacher"]), "device": "cpu"},
            "data": {"train": str(data_file), "eval": {"test": str(data_file)}, "eval_limit": 5},
            "rollout": {"prompts": 8, "max_new_tokens": 12},
            "optim": {"steps": 3, "lr": 1e-3},
            "eval": {"grader": "exact", "n": 2, "k": 2, "max_new_tokens": 8, "start": False},
            "run": {"name": "tiny", "dir": str(tmp_path / "runs"), "save_every": 0, "trajectories_every": 0},
        }
        for key, value in overrides.items():
            section, _, option = key.partition("__")
            data.setdefault(section, {})[option] = value
        if "teachers" in data:
            del data["teacher"]
        return config_module.build(data)

    return build


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs run here, without the seconds that a new process takes to import torch; returns those that ran."""
    ran: list[Job] = []

    def run_here(jobs: Sequence[Job], *_: Any, **__: Any) -> dict[str, str]:
        failed = {}
        for job in jobs:
            if job.finished:
                continue
            ran.append(job)
            try:
                train(job.config, quiet=True) if job.trains else evaluate_untrained(job.config)
            except UserError as error:
                failed[job.name] = str(error)
        return failed

    monkeypatch.setattr("onpath.commands.study.command.run_jobs", run_here)
    return ran
