"""Every bad input is answered by one sentence and exit code 2, in whatever command meets it."""

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onpath.commands.cli import main
from onpath.config.build import build
from onpath.config.methods import METHODS
from onpath.config.sections import Reward, Teacher
from onpath.config.sentences import section_type
from onpath.config.whole import LABELLED, Config
from onpath.data.load import load_prompts
from onpath.system.errors import UserError
from tests.faults import inputs
from tests.mutate import damaged, mutated

_SHORT = 1000
"""Characters of a sentence about something that may be endless."""


def said_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with 2."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("onpath: ")
    assert said.count("\n") == 1
    assert "\x1b" not in said
    assert len(said) < _SHORT
    return said


def refused(source: Path | str, words: str, **options: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_prompts(str(source), **options)
    assert len(str(caught.value)) < _SHORT + len(str(source))


@pytest.mark.parametrize("name", inputs.YAML)
def test_yaml(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = inputs.YAML[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert re.search(words, said_by(["config", str(path)], capsys))


@pytest.mark.parametrize(("dotted", "value", "words"), inputs.OPTIONS)
def test_options(
    dotted: str, value: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section, _, key = dotted.partition(".")
    tree = {section: {key: value} if key else value}
    with pytest.raises(UserError, match=words):
        build(tree)
    path = tmp_path / "config.yaml"
    spelt = json.dumps(tree).replace("NaN", ".nan").replace("Infinity", ".inf")
    path.write_text(spelt)
    said_by(["config", str(path)], capsys)


@pytest.mark.parametrize(("text", "words"), inputs.STUDIES)
def test_studies(
    text: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(text)
    assert re.search(words, said_by(["study", "study.yaml"], capsys))
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"], "nothing is written"


@pytest.mark.parametrize(("arguments", "words"), inputs.COMMANDS)
def test_command_lines(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in said_by([*arguments], capsys)


@pytest.mark.parametrize("path", inputs.PATHS)
@pytest.mark.parametrize("reader", inputs.READERS_OF_PATHS, ids=" ".join)
def test_paths(
    reader: tuple[str, ...],
    path: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    said_by([word.replace("PATH", path) for word in reader], capsys)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("arguments", inputs.EMPTY, ids=" ".join)
def test_empty_paths(
    arguments: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(r"is empty|is ''", said_by([*arguments], capsys))
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(("content", "words"), inputs.ROWS)
def test_rows(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content + b"\n")
    refused(path, words)
    path.write_bytes(b'{"id": "good", "prompt": "7"}\n' + content + b"\n")
    if content.strip():
        assert load_prompts(str(path), skip_bad=True).prompts[0].id == "good"


@pytest.mark.parametrize(("content", "words"), inputs.TAUGHT_ROWS)
def test_taught_rows(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"id": "good", "prompt": "7", "of": "math"}\n' + content + b"\n")
    teachers: dict[str, Any] = {"teachers": ("math", "code"), "columns": {"teacher": "of"}}
    refused(path, f"line 2: {words}" if "|" not in words else words, **teachers)
    assert [p.teacher for p in load_prompts(str(path), skip_bad=True, **teachers).prompts] == ["math"]


@pytest.mark.parametrize(("source", "words"), inputs.SOURCES)
def test_sources(source: str, words: str) -> None:
    refused(source, words)


@pytest.mark.parametrize(("name", "content", "words"), inputs.FILES)
def test_files(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, words)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    path = tmp_path_factory.mktemp("saved")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", "2"]}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("number", range(len(inputs.SAVED)))
def test_saved_data_sets(number: int, saved: Path) -> None:
    name, content, words = inputs.SAVED[number]
    path, before = saved / name, (saved / name).read_bytes()
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    try:
        refused(saved, words)
    finally:
        path.rmdir() if content is None else path.unlink()
        path.write_bytes(before)
    assert len(load_prompts(str(saved)).prompts) == 2


def each_option() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Section, option and what must stand beside it."""
    for section in Config.model_fields:
        if section == "method":
            for name, options in METHODS.items():
                yield from (("method", key, {"name": name}) for key in options.model_fields)
        elif section == "rewards":
            yield from (("rewards", key, {"name": "mine.py:f"}) for key in Reward.model_fields)
        elif section == "teachers":
            yield from (("teachers", key, {}) for key in Teacher.model_fields)
        else:
            yield from ((section, key, {}) for key in section_type(section).model_fields)


ANYTHING: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**400, 1e308, math.nan, math.inf, "", "x", "x" * 5000, "\x1b[2J", "\ud800",
    "a\x00b", "~nouser/x", "../../x", [], [None], [["x"]], {}, {"x": {}}, {1: 2}, {"": 1}, b"x", {1, 2},
    "2024-01-01", 10**12, "mine.py:f", [1] * 3000,
)  # fmt: skip


@pytest.mark.parametrize("value", ANYTHING, ids=lambda v: repr(v)[:20] if abs_small(v) else "long")
def test_every_option_with_anything(value: Any) -> None:
    """A config, or one short sentence."""
    for section, key, beside in each_option():
        options = {**beside, key: value}
        try:
            build({section: {"a": options} if section in LABELLED else options})
        except UserError as error:
            said = str(error)
            assert len(said) < 1400, (section, key)
            assert not set("\x1b\n") & set(said), (section, key)


def abs_small(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 10**20


def test_five_hundred_rows(tmp_path: Path) -> None:
    good = {
        "id": "a", "prompt": [{"role": "user", "content": "1+1"}], "answer": "2", "solution": "x",
        "reward_model": {"ground_truth": "1"},
    }  # fmt: skip
    rng, path, said = random.Random(0), tmp_path / "train.jsonl", []
    for _ in range(500):
        path.write_bytes(mutated(good, rng) + b"\n")
        columns = rng.choice([None, {"prompt": "prompt"}, {"answer": "reward_model.ground_truth"}])
        try:
            load_prompts(str(path), columns=columns)
        except UserError as error:
            said.append(str(error))
    assert len(said) > 200
    assert max(map(len, said)) < _SHORT


def test_five_hundred_parquet_files(tmp_path: Path) -> None:
    rng, path, said = random.Random(0), tmp_path / "train.parquet", []
    table = pa.table(
        {"prompt": ["a", "b"] * 20, "answer": ["1", "2"] * 20, "id": [str(i) for i in range(40)]}
    )
    pq.write_table(table, path, compression="none")
    good = path.read_bytes()
    for _ in range(500):
        path.write_bytes(damaged(good, rng))
        try:
            load_prompts(str(path))
        except UserError as error:
            said.append(str(error))
    assert len(said) > 200
