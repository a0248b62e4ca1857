"""The recipe's task, its checker of steps, and its study on tiny random models."""

import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from onpath import config as configuration
from onpath.commands.probes.base import sampled
from onpath.commands.study.plan import Job
from onpath.commands.study.run import run_study
from onpath.data import tasks
from onpath.run.assemble import assemble
from onpath.system import code

RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-study"
STUDIES = sorted(path.name for path in RECIPE.glob("*.yaml") if "arms" in configuration.read_yaml(path))
TEXT = (
    "Ann has 7 pens. Ben gives Ann 2 pens. Ann buys 3 bags with 4 pens each. How many pens does Ann have now?"
)
RIGHT = (
    "We add 2 and get 7 + 2 is 9. Now we have 3 groups of 4: 3 * 4 = 12. Then 9 + 12 = 21. The answer is 21."
)
SHORT = {"error": "e", "consequence": "q", "right": "r", "copied": ".", "habit": "h"}


@pytest.fixture(scope="module")
def words() -> Iterator[Any]:
    """The recipe's module, and its task known as long as the tests run."""
    known = dict(tasks._TASKS)
    with code.allowed():
        grade = code.load(f"{RECIPE / 'words.py'}:grade", key="eval.grader")
    yield sys.modules[grade.__module__]
    tasks._TASKS.clear()
    tasks._TASKS.update(known)


def kinds(words: Any, response: str) -> str:
    """One letter a word."""
    task = words.WordProblems()
    pieces = [f"{w} " for w in response.split()]
    return "".join(SHORT[k] for k in task.labels(TEXT, pieces))


def test_a_problem_is_read(words: Any) -> None:
    problem = words.parse(TEXT)
    assert [(s.op, *s.operands(problem.values())) for s in problem.steps] == [
        ("+", 7, 2),
        ("*", 3, 4),
        ("+", 9, 12),
    ]
    assert problem.answer == 21
    assert words.parse("Why?") is None


def test_a_right_solution(words: Any) -> None:
    #                             We add 2 and get 7 + 2 is 9. Now we have 3 groups of 4:  3 * 4 = 12. Then …
    assert kinds(words, RIGHT) == "h..hh...hr" + "hhh..h." + "...hr" + "h...hr" + "hhh."
    assert words.Reading(words.parse(TEXT), RIGHT).errors == []
    other = "3 * 4 = 12. 2 + 7 = 9. 12 + 9 = 21. The answer is 21."  # any order that can be taken
    assert words.Reading(words.parse(TEXT), other).errors == []


@pytest.mark.parametrize(
    ("response", "labels", "kind", "sound"),
    [
        ("7 + 2 = 8. 3 * 4 = 12. 8 + 12 = 20. The answer is 20.", "...he...hrq..hqhhhq", "arithmetic", ""),
        ("7 + 2 = 9. 3 * 4 = 12. 9 + 12 = 31. The answer is 31.", "...hr...hr...hehhhq", "arithmetic", None),
        ("7 + 2 = 9. 3 * 4 = 12. The answer is 12.", "...hr...hrhhhe", "other", "7 + 2 = 9. 3 * 4 = 12."),
        ("7 - 2 = 5. 5", ".eqqqe", "operation", ""),
        ("We take 2", "he.", "operation", ""),
        ("7 + 2 = 9. We multiply 6", "...hrh.e", "operand", "7 + 2 = 9."),
        ("7 + 2 = 9. 3 * 5 = 15.", "...hr..eqq", "operand", "7 + 2 = 9."),
    ],
)
def test_wrong_ones(words: Any, response: str, labels: str, kind: str, sound: str | None) -> None:
    """Each token, what came first, and what stands before the first wrong sentence."""
    task = words.WordProblems()
    assert kinds(words, response) == labels
    assert task.error_kind(TEXT, [response]) == kind
    if sound is not None:
        assert response[: task.first_error(TEXT, response)].strip() == sound


def test_a_prefix_is_labelled_as_in_the_whole(words: Any) -> None:
    """A probe asks what the next token would be."""
    task, tokens = words.WordProblems(), list(RIGHT)
    whole = task.labels(TEXT, tokens)
    assert all(
        task.labels(TEXT, tokens[: t + 1])[-1] != "error"
        for t, k in enumerate(whole)
        if k in ("right", "copied")
    )


@pytest.mark.parametrize("split", ["train", "hard", "hard_train"])
def test_both_writers_are_right_in_their_own_words(words: Any, split: str) -> None:
    for i, problem in enumerate(islice(words.problems(split), 100)):
        texts = [w.write(random.Random(i), problem) for w in (words.TEACHER, words.STUDENT)]
        assert texts[0] != texts[1]
        for text in texts:
            reading = words.Reading(problem, text)
            assert not reading.errors, (problem.text, text)
            assert reading.written == problem.values()
            assert words.grade(text, str(problem.answer))
        assert len(problem.steps) in ((3, 4) if split.startswith("hard") else (2,))
        assert max(problem.values().values()) <= words.LARGEST


def test_splits_do_not_overlap(words: Any) -> None:
    task = words.WordProblems()
    texts = [row["prompt"] for split in words.SPLITS for row in task.rows(split, 150)]
    assert len(set(texts)) == 150 * len(words.SPLITS)
    assert list(task.rows("test", 5)) == list(task.rows("test", 9))[:5]


def test_a_rewrite_keeps_what_is_sound(words: Any) -> None:
    problem, rng = words.parse(TEXT), random.Random(0)
    assert words.rewritten(rng, problem, RIGHT, words.STUDENT) == RIGHT
    wrong = RIGHT.replace("3 * 4 = 12", "3 * 4 = 13")
    made = words.rewritten(rng, problem, wrong, words.STUDENT)
    assert made.startswith("We add 2 and get 7 + 2 is 9. ")
    assert words.grade(made, "21")
    assert not words.Reading(problem, made).errors
    garbage = words.rewritten(rng, problem, "no idea", words.STUDENT)
    assert words.grade(garbage, "21")


def test_the_probed_config_asks_what_the_study_asks(words: Any) -> None:
    config, study = (configuration.read_yaml(RECIPE / name) for name in ("topd.yaml", "others.yaml"))
    with code.allowed():
        assert configuration.load(RECIPE / "topd.yaml").run.name == "smollm2-study-topd"
    assert config["method"] == study["arms"]["topd"]["method"]
    for section, key in (("student", "model"), ("teacher", "model"), ("data", "system"), ("data", "limit")):
        assert config[section][key] == study["base"][section][key]
    asked = {**config["optim"], "bf16": study["base"]["optim"]["bf16"]}  # probes read in float32
    assert {k: v for k, v in asked.items() if k != "steps"} == study["base"]["optim"]


def new_arms(path: Path) -> dict[str, Any]:
    """Those of a study that no study before it has, and what they are compared with and tuned like."""
    before: list[Any] = []
    for other in sorted(RECIPE / name for name in STUDIES):
        arms = {name: without_budget(arm) for name, arm in configuration.read_yaml(other)["arms"].items()}
        if other == path:
            break
        before += arms.values()
    of_all = {arm["tuned_like"] for arm in arms.values() if isinstance(arm, dict) and "tuned_like" in arm}
    return {k: arm for k, arm in arms.items() if arm not in before or k in {"opd", *of_all}}


def without_budget(arm: Any) -> Any:
    return {k: value for k, value in arm.items() if k != "budget"} if isinstance(arm, dict) else arm


def smaller(path: Path, models: dict[str, Path], out: Path) -> dict[str, Any]:
    """The study on tiny random models: two rollouts and one update an arm."""
    tree = configuration.read_yaml(path)
    base = tree["base"]
    asked = {"longer" if path.stem == "hard" else "student", "better"}
    assert {Path(base[role]["model"]).name for role in ("student", "teacher")} == asked
    for role in ("student", "teacher"):
        base[role] |= {"model": str(models[role]), "device": "cpu"}
    base["student"]["lora_rank"] = 2
    base["data"]["limit"] = 4
    base["rollout"] |= {"prompts": 2, "max_new_tokens": 6}
    base["eval"]["grader"] = f"{RECIPE}/{base['eval']['grader']}"
    base["run"]["save_every"] = 0
    tree["arms"] = new_arms(path)
    changed: dict[str, Any] = {"seeds": [0], "budget": {"updates": 1}, "dir": str(out)}
    changed |= {key: {**tree[key], "limit": 1} for key in ("evals", "tune") if key in tree}
    if "tune" in tree:
        changed["tune"]["lrs"] = tree["tune"]["lrs"][:2]
    return {**tree, **changed}


@pytest.mark.filterwarnings("ignore:.*lora.*:UserWarning")
@pytest.mark.parametrize("name", STUDIES)
def test_the_study_runs(
    name: str, words: Any, model_dirs: dict[str, Path], tmp_path: Path, in_process: list[Job]
) -> None:
    """Every arm trains."""
    tree = smaller(RECIPE / name, model_dirs, tmp_path)
    (tmp_path / "smaller.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    found = run_study(tmp_path / "smaller.yaml", allow_code=True, quiet=True)
    assert {row["arm"] for row in found.data["rows"]} == set(tree["arms"])
    trained = [row for row in found.data["rows"] if row["kind"] == "train"]
    assert trained
    assert all(row["updated_tokens"] > 0 for row in trained)


def test_the_figures_are_counted_by_hand(tmp_path: Path) -> None:
    """Ten tokens of one rollout: the loudest is the error with the largest D."""
    with code.allowed():
        near, recover = (
            code.load(f"{RECIPE / 'figures.py'}:{name}", key="figures")
            for name in ("near_futures", "recoverability")
        )
    places = [
        {
            "prompt_id": "1",
            "reverse_kl": 1.0 - t / 10,
            "distance": 0.5 if t == 0 else 0.0,
            "label": "habit" if t else "error",
        }
        for t in range(10)
    ]
    rule = {
        "rule": "loss alone",
        "flagged": 1,
        "precision": 1.0,
        "precision_ci95": [0.2, 1.0],
        "recall": 1.0,
        "habits": 0.0,
    }
    (tmp_path / "divergence.jsonl").write_text("".join(json.dumps(p) + "\n" for p in places))
    (tmp_path / "divergence.json").write_text(json.dumps({"detection_of_errors": [rule]}))
    said = "\n".join(near(tmp_path))
    assert "| loudest tenth | 1 | 1.000 | 0.500 | 0.500 | 0% | error 100% |" in said
    assert "| quiet half | 5 | 0.300 | 0.000 | 0.000 | 100% | habit 100% |" in said
    assert "upper quartile (0.000): 0 of 1" in said
    assert "| loss alone | 1 | 100% [20%, 100%] | 100% | 0% |" in said
    wrong = {
        "right": False,
        "first_error": 2,
        "positions": [2, 6],
        "student": [2, 0],
        "teacher": [4, 1],
        "trials": 4,
    }
    row = {**wrong, "onset_mass": [0.001] * 3 + [0.003] * 5}
    (tmp_path / "prefix_failure.jsonl").write_text(json.dumps(row) + "\n")
    said = "\n".join(recover(tmp_path))
    assert "| wrong one, up to the first wrong step | 1 | 50% | 100% | 1.00‰ |" in said
    assert "| wrong one, behind it | 1 | 0% | 25% | 3.00‰ |" in said


def test_what_targets_consist_of_adds_up_to_what_is_logged() -> None:
    with code.allowed():
        targets, table = (
            code.load(f"{RECIPE / 'targets.py'}:{name}", key="targets") for name in ("targets", "table")
        )
    tree = {
        "student": {"device": "cpu"},
        "teacher": {"device": "cpu"},
        "data": {"train": "gym:train", "limit": 16, "eval": {}},
        "method": {"name": "topd", "window": 8},
        "rollout": {"prompts": 8, "max_new_tokens": 112},
    }
    parts = assemble(configuration.build(tree))
    rollouts = sampled(parts, 8)
    means = parts.method.prepare(rollouts, step=0).means
    found = list(targets(parts, rollouts, parts.config.method.epsilon))
    assert len(found) == means["target_own_share"][1] > 0
    assert sum(t.own for t in found) == pytest.approx(means["target_own_share"][0])
    on_teacher = sum(t.own if t.agreed else t.teacher for t in found)
    assert on_teacher == pytest.approx(means["target_teacher_share"][0])
    assert all(0 <= t.bag <= 1 + 1e-9 for t in found)
    lines = list(table({0.05: found, 0.02: []}))
    assert len(lines) == 2 + 6
    assert lines[2].startswith(f"| 0.05 | all, {len(found)} |")
    assert lines[-1] == "| 0.02 | where the two differ, 0 | – | – | – | – |"
