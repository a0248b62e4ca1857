"""Foreign files: whatever is in them, a value or one sentence that names the file; never a traceback."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from onpath import config as configuration
from onpath.system import reading
from onpath.system.errors import UserError
from tests.mutate import damaged, mutated

CONFIG = """\
student: {model: gym:student, dtype: float32}
data:
  train: gym:train
  eval: &sets {test: "gym:test"}
method: {name: topd, guidance_weight: auto, top_share: 0.1}
optim: {steps: 10, lr: 1.0e-3}
run: {name: 2024-01-31, dir: runs, seed: 0}
"""
BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases that stand for more"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 5000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("a: " + "9" * 5000, "line 1: not valid YAML: a number of 5000 digits"),
        ("a: 1\nb: \x1b[2J", "not valid YAML"),
        ("a: 1\n\x00", "not valid YAML"),
        ("a: 1\na: 2", "line 2: not valid YAML: a stands here a second time"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: 0b", ""),
        ("a: \ud800", "not UTF-8"),
    ],
)
def test_yaml_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if not words:
        reading.read_yaml(path)
        return
    with pytest.raises(UserError, match=words) as caught:
        reading.read_yaml(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


NESTED = {
    "flow": "[" * 200_000,
    "mappings": "{a: " * 100_000,
    "sequences on a line": "- " * 200_000,
    "keys on a line": "? " * 200_000,
    "indented": "\n".join(" " * i + "a:" for i in range(3000)),
    "indented sequences": "\n".join("  " * i + "-\n" + "  " * i + " - a:" for i in range(1500)),
    "at one indentation": "\n".join(" " * i + "a:\n" + " " * i + "- " for i in range(1500)),
}


@pytest.mark.parametrize("kind", NESTED)
def test_depth_is_a_sentence_and_no_crash(kind: str, tmp_path: Path) -> None:
    """libyaml would follow these on the C stack until it ends."""
    assert reading._levels(NESTED[kind]) > reading._SURELY_FLAT
    path = tmp_path / "deep.yaml"
    path.write_text(NESTED[kind])
    with pytest.raises(UserError, match=r"deep\.yaml.*not valid YAML"):
        reading.read_yaml(path)


ODD = ["a:\tb", "a: 1\n  \tb", "a: |#\n  x", "a: !!bool x", "a: !!int ''", "a: !!timestamp x"]


@pytest.mark.parametrize("text", ODD)
def test_what_pyyaml_refuses_is_refused_with_libyaml_too(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"odd\.yaml.*not valid YAML"):
        reading.read_yaml(path)


def test_levels_are_never_more_than_counted() -> None:
    """Of random collections, written in flow and in block style."""
    draw = random.Random(0)

    def tree(level: int) -> Any:
        if level == 0:
            return "x"
        return [tree(level - 1)] if draw.random() < 0.5 else {"a": tree(level - 1)}

    for level in range(40):
        for style in (True, False, None):
            text = yaml.safe_dump(tree(level), default_flow_style=style)
            assert reading._levels(text) >= level, text


RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_both_parsers_read_the_same(path: Path) -> None:
    text = path.read_text()
    assert reading._levels(text) <= reading._SURELY_FLAT
    assert reading._parsed(text, reading._FastLoader) == reading._parsed(text, reading._Loader)


def test_dates_are_text_and_a_key_may_look_like_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    assert configuration.load(path).run.name == "2024-01-31"
    assert configuration.load(path, {"run.name": "2025-12-31"}).run.name == "2025-12-31"


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000, "a\x00b", "~nouser/x.yaml", "\x1b[2J.yaml", "."])
def test_paths_that_lead_nowhere(path: str) -> None:
    for read in (reading.read_yaml, reading.read_json, reading.read_text):
        with pytest.raises(UserError) as caught:
            read(Path(path))
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("key", ["optim.steps", "optim.lr", "run.seed", "method.top_share", "eval.n"])
def test_true_is_no_number(key: str, value: bool) -> None:
    section, _, name = key.partition(".")
    tree = {section: {name: value}}
    if section == "method":
        tree["method"]["name"] = "topd"  # type: ignore[assignment]
    with pytest.raises(UserError, match=f"{name} is {str(value).lower()}, which is no number"):
        configuration.build(tree)


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".hidden", "a" * 200, "a b", "\x1b[2J"])
def test_a_split_is_a_name(name: str) -> None:
    with pytest.raises(UserError, match="no name for a split"):
        configuration.build({"data": {"eval": {name: "gym:test"}}})


READERS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "config": (CONFIG, configuration.load),
    "json": ({"passed": True, "n": 3}, lambda p: reading.read_json(p, keys={"passed": bool, "n": int})),
    "lines": ("", lambda p: list(reading.json_lines(p))),
}


@pytest.mark.parametrize("kind", READERS)
def test_five_hundred_damaged_files_of_each_kind(kind: str, tmp_path: Path) -> None:
    good, read = READERS[kind]
    rng, path = random.Random(kind), tmp_path / f"{kind}.txt"
    if kind == "lines":
        good = "".join(f'{{"step": {i}, "loss": 0.5, "seconds": {{"train": 1.0}}}}\\n' for i in range(6))
    read(written(path, good.encode() if isinstance(good, str) else mutated_nothing(good)))
    said = []
    for _ in range(500):
        data = damaged(good.encode(), rng) if isinstance(good, str) else mutated(good, rng)
        try:
            read(written(path, data))
        except UserError as error:
            said.append(str(error))
    assert all(len(s) < 900 and "\x1b" not in s for s in said)
    assert len(said) > 100 or kind == "lines"


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def mutated_nothing(good: Any) -> bytes:
    import json

    return json.dumps(good).encode()


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_an_end_that_is_missing_is_missed_where_the_text_ends(end: str) -> None:
    """Behind the line's end it was line 2 of a file with one."""
    assert reading.parse_json('{"a": 1}' + end) == {"a": 1}
    with pytest.raises(ValueError, match=r"Expecting ',' delimiter at column 8$"):
        reading.parse_json('{"a": 1' + end)
    with pytest.raises(ValueError, match="at line 2, column 2"):
        reading.parse_json(b'{"a":\n1' + end.encode())
