"""Recipes cannot rot: each is a config; those of the papers run to their end on tiny models of their kind."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from onpath import config as configuration
from onpath.commands.doctor.fits import parts_of, spread, step_of_config
from onpath.config.describe import describe
from onpath.records import Prompt, Rollout, Sampling
from onpath.run.log import read_lines
from onpath.system import code
from onpath.training import train

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = sorted((RECIPES / "paper").glob("*.yaml"))
GPU_SETTINGS = {"trd-opd", "trd-opsd", "opd", "opsd", "sft", "topd", "relay"}


def named(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_recipe_is_a_config(path: Path) -> None:
    """Or a study, or one that runs code of its own: those have tests of their own."""
    tree = configuration.read_yaml(path)
    options = [value for section in tree.values() if isinstance(section, dict) for value in section.values()]
    if "base" not in tree and not any(map(code.is_own, options)):
        assert configuration.load(path).run.name == tree["run"]["name"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with the columns of the papers' data."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [
        {"problem": f"{i} plus {i} is what", "answer": str(2 * i), "solution": f"it is {2 * i}"}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def smaller(path: Path, models: dict[str, Path], problems: Path, runs: Path) -> list[tuple[str, str]]:
    """What must differ where there is no GPU, no hub and no time: models, data, sizes and places."""
    tree = configuration.read_yaml(path)
    given: dict[str, Any] = {
        "student.model": models["student"], "student.device": "cpu", "data.train": problems,
        "data.eval": json.dumps({"aime24": str(problems)}), "data.eval_limit": 1, "rollout.engine": "hf",
        "rollout.vllm": "{}", "rollout.prompts": 2, "rollout.max_new_tokens": 12, "optim.steps": 1,
        "eval.n": 2, "eval.k": 2, "eval.max_new_tokens": 8, "eval.start": "false", "run.dir": runs,
    }  # fmt: skip
    if "teacher" in tree:
        given |= {"teacher.model": models["teacher"], "teacher.device": "cpu"}
    if tree["method"]["name"] == "trd":
        given |= {"method.rewrite_max_new_tokens": 10, "method.rewrite_prompt_tokens": 300}
        given |= {"method.template": "{problem} {attempt}" + " {solution}" * ("teacher" in tree["method"])}
    if tree["method"]["name"] == "topd":
        given["method.window"] = 4
    if tree["method"]["name"] == "relay":
        given |= {"method.hold": 5, "method.reflection_k": 1, "method.words": json.dumps(["a", "e", "t"])}
    return [(key, str(value)) for key, value in given.items()]


@pytest.mark.parametrize("path", PAPER, ids=named)
def test_vllm_has_room_for_a_papers_longest_response(path: Path) -> None:
    config = configuration.load(path)
    assert config.eval.max_new_tokens is not None
    asked = max(config.rollout.max_new_tokens, config.eval.max_new_tokens)
    assert config.rollout.vllm["max_model_len"] >= asked + 2048  # a long problem


@pytest.mark.filterwarnings("ignore:.*lora.*:UserWarning")
@pytest.mark.parametrize("path", PAPER, ids=named)
def test_a_paper_runs(path: Path, model_dirs: dict[str, Path], problems: Path, tmp_path: Path) -> None:
    config = configuration.load(path, smaller(path, model_dirs, problems, tmp_path))
    assert config.run.name == path.stem
    result = train(config, quiet=True)
    rows = read_lines(result.directory / "metrics.jsonl")
    (row,) = rows
    assert row["tokens"] > 0
    assert row["loss"] > 0
    assert (row["grad_norm"] > 0) != bool(
        config.method.token_clip
    )  # random models: no token is below the clip


PAPER_README = (RECIPES / "paper" / "README.md").read_text()
SHAPES = {
    "Qwen/Qwen3-1.7B": (28, 2048, 16, 6144, True),
    "Qwen/Qwen3-4B-Instruct-2507": (36, 2560, 32, 9728, True),
    "Qwen/Qwen3-8B": (36, 4096, 32, 12_288, False),
}
"""Of their config.json: layers, H, heads, I, tied; all have 8 heads of keys, of 128, and 151,936 tokens."""


def table() -> dict[str, list[str]]:
    """Of recipes/paper/README.md: each config's cells of memory and time."""
    found: dict[str, list[str]] = {}
    for line in PAPER_README.splitlines():
        if not re.match(r"\| `(trd|opd|sft|opsd|topd|relay)-", line):
            continue
        first, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        names: list[str] = []
        for name in re.findall(r"`([\w.-]+)`", first):  # `opd-1.7b-forward`, `-clip`
            names.append(names[0].rpartition("-")[0] + name if name.startswith("-") else name)
        for i, name in enumerate(names):
            each = [cell.split(", ") for cell in cells]
            found[name] = [some[i] if len(some) == len(names) > 1 else ", ".join(some) for some in each]
    return found


def test_the_table_is_what_doctor_calculates(tmp_path: Path) -> None:
    """From models' config.json alone."""
    for name, (layers, width, heads, inner, tied) in SHAPES.items():
        Qwen3Config(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=8,
            head_dim=128, intermediate_size=inner, tie_word_embeddings=tied, vocab_size=151_936,
        ).save_pretrained(tmp_path / name)  # fmt: skip
    stated, known = table(), dict[str, list[str]]()
    assert stated.keys() == {path.stem for path in PAPER}
    for path in PAPER:
        tree = configuration.read_yaml(path)
        method = {key: tree["method"].get(key) for key in ("name", "writer", "weights")}
        alike = repr([tree["student"], tree.get("teacher"), method, tree["rollout"], tree["optim"]])
        if alike not in known:
            roles = [role for role in ("student", "teacher") if role in tree]
            local = [(f"{role}.model", str(tmp_path / tree[role]["model"])) for role in roles]
            config = configuration.load(path, local)
            step = step_of_config(config, device=torch.device("cuda"))
            planned = [parts_of(step), parts_of(spread(step, 8), shard="layer", world=8)]
            known[alike] = [f"{part['peak'] / 1e9:.0f}" for part in planned]
        assert stated[path.stem][:2] == known[alike], path.stem


RESPONSE = {"trd": 900}
"""Tokens of what is trained on, by method; elsewhere 7,700."""
SAMPLING = {"Qwen/Qwen3-1.7B": 158, "Qwen/Qwen3-4B-Instruct-2507": 212, "Qwen/Qwen3-8B": 310}
"""Seconds of a step of 128 responses of 7,700 tokens."""


def weights(model: str) -> float:
    """Of a model, norms aside."""
    layers, width, heads, inner, tied = SHAPES[model]
    layer = 2 * width * 128 * (heads + 8) + 3 * width * inner
    return layers * layer + 151_936 * width * (1 if tied else 2)


def hours(config: configuration.Config) -> float:
    """The formula of recipes/paper/README.md, "Calculated, not measured"."""
    assert config.optim.steps
    teacher = config.teacher.model if config.teacher.model in SHAPES else config.student.model
    writes = getattr(config.method, "writer", None) == "teacher"
    count = config.rollout.prompts * config.rollout.n
    length = min(7700, config.rollout.max_new_tokens)
    seconds = 490.0 if writes or config.method.name == "trd" else 0.0
    seconds += 0.0 if writes else SAMPLING[config.student.model] * count * length / (128 * 7700)
    if config.method.name == "relay":
        seconds += 2 * (40 + 61 + 158)
    tokens = RESPONSE.get(config.method.name, length) * count
    scored = config.method.divergence != "cross_entropy"
    seconds += scored * 2 * weights(teacher) * tokens / (0.5 * 989e12)
    passes = 6 if config.student.lora_rank else 8  # forward, again, and back: through an adapter's base once
    seconds += passes * weights(config.student.model) * tokens / (0.4 * 989e12)
    guided = 1.41 if config.method.name == "topd" else 1.0
    return guided * config.optim.steps * seconds / 3600


def test_the_hours_are_what_their_formula_gives() -> None:
    stated = table()
    for path in PAPER:
        exact = hours(configuration.load(path))
        said = re.sub(r"^up to | \(.*", "", stated[path.stem][2])
        assert said == (f"{exact:.0f}" if exact >= 0.5 else "under 1"), path.stem


def test_the_baselines_of_the_larger_student_are_those_of_the_smaller() -> None:
    commands = re.findall(r"^\$ onpath train recipes/paper/(\S+) (--.*)$", PAPER_README, flags=re.M)
    assert {file for file, _ in commands} == {"opd-4b.yaml", "trd-opd-4b.yaml"}
    for file, options in commands:
        given = options.split()
        overrides = [(k.removeprefix("--"), v) for k, v in zip(given[::2], given[1::2], strict=True)]
        larger = configuration.load(RECIPES / "paper" / file, overrides)
        smaller = configuration.load(RECIPES / "paper" / f"{larger.run.name.replace('4b', '1.7b')}.yaml")
        assert larger.method == smaller.method
        assert larger.optim == smaller.optim


def test_every_method_of_the_papers_is_there() -> None:
    assert {re.sub(r"-\d.*", "", p.stem) for p in PAPER} == GPU_SETTINGS
    sizes = {p.stem for p in PAPER}
    assert {"trd-opd-1.7b", "trd-opd-4b", "trd-opsd-4b", "trd-opsd-8b", "topd-1.7b"} <= sizes


@pytest.mark.parametrize("path", sorted((RECIPES / "paper").glob("launch_*")), ids=named)
def test_a_launch_script_is_shell_and_names_options_that_exist(path: Path) -> None:
    assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0
    known = {option[0] for option in describe()}
    asked = set(
        re.findall(r"--((?:rollout|teacher|student|method|parallel|optim|run)\.\w+)", path.read_text())
    )
    assert asked <= known


def test_launch_scripts_find_the_student_and_its_room() -> None:
    script = (RECIPES / "paper" / "launch_eight_gpus.sh").read_text()
    for name in ("student", "room"):
        (line,) = re.findall(rf"^{name}=\$\((.*)\)$", script, flags=re.M)
        for path in PAPER:
            found = subprocess.run(
                ["sh", "-c", f'recipe="{path}"; {line}'], capture_output=True, text=True, check=True
            )
            tree = configuration.read_yaml(path)
            wanted = (
                tree["student"]["model"] if name == "student" else tree["rollout"]["vllm"]["max_model_len"]
            )
            assert found.stdout.strip() == str(wanted)


def test_the_own_method_keeps_the_same_half_whatever_the_number_of_processes() -> None:
    with code.allowed():
        half = code.load(f"{RECIPES / 'own-method' / 'longer.py'}:Half", key="method.name")
    rollouts = [
        Rollout(
            prompt=Prompt(id=str(i), text="?"), ids=(1,) * (1 + i % 4), logprobs=(-1.0,) * (1 + i % 4),
            finish_reason="stop", policy_version=0, sampling=Sampling(), context=(1,),
        )
        for i in range(10)
    ]  # fmt: skip

    def kept(parts: list[list[Rollout]], keep: str) -> set[str]:
        found: set[str] = set()
        for mine in parts:
            method = half.__new__(half)
            method.options = half.Options(keep=keep)
            method.tools = SimpleNamespace(sampling=Sampling())
            everyone = [(method.rank(r, 3), r.key) for part in parts for r in part]
            method.tools.gather = lambda items, everyone=everyone: everyone
            made = method.prepare(mine, step=3).trajectories
            found |= {t.origin.key for t in made if t.edit.kept}
        return found

    for keep in ("longer", "shorter", "random"):
        whole = kept([rollouts], keep)
        assert len(whole) == 5
        assert kept([rollouts[::2], rollouts[1::2]], keep) == whole
