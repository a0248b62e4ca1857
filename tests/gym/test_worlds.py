"""Worlds: what each strength does, that 0 is the gym as it was, and that nothing depends on more than
(seed, problem)."""

import pytest

from onpath import config as configuration
from onpath import gym
from onpath.data.tasks import other_split, part_of, task_of
from onpath.gym.check import ARITHMETIC, NOT_READY, OTHER, error_kind, label_tokens
from onpath.gym.demos import Beliefs
from onpath.gym.tasks import Problem, parse_problem, split_of
from onpath.gym.vocab import NAMES
from onpath.gym.worlds import Worlds
from onpath.run.inputs import load_evals
from onpath.system.errors import UserError

PROMPT = "a: 35 + 47; b: a * 3; c: 62 - a; d: b + c; d?"
SOUND = gym.tokenize("a: 35 + 47 = a82; b: a82 * 3 = b46; ")


def problem(text: str) -> Problem:
    found = parse_problem(text)
    assert found is not None
    return found


def literal_first(row: dict[str, str]) -> list[bool]:
    """Of the definitions that use numbers alone: whether the student misbelieves them."""
    beliefs, found = Beliefs(), []
    for node in problem(row["prompt"]).nodes:
        if not node.needs:
            left, right = int(node.left), int(node.right)
            truth = {"+": left + right, "-": left - right, "*": left * right}[node.op] % 100
            import random

            written = [beliefs.result(random.Random(i), node, left, right) for i in range(40)]
            found.append(any(w != f"{truth:02d}" for w in written))
    return found


def test_strength_0_is_the_gym_bit_for_bit() -> None:
    for split in ("train", "hard"):
        assert list(task_of("gym:x?late=0&spoil=0&lost=0").rows(split, 30)) == gym.rows(split, 30)  # type: ignore[union-attr]
    world = Worlds()
    assert not world.spoils
    assert not world.loses
    assert world.spoiled(0, PROMPT, SOUND) is None
    assert world.lost_after(0, ["<bos>", *gym.tokenize(PROMPT), "<sol>", "d: "]) is None


def test_late_leaves_errors_to_the_steps_that_need_a_result() -> None:
    plain, late = gym.rows("train", 60), Worlds(late=1.0).rows("train", 60)
    assert any(any(literal_first(row)) for row in plain)
    assert not any(any(literal_first(row)) for row in late)
    for before, after in zip(plain, late, strict=True):
        one, two = problem(before["prompt"]), problem(after["prompt"])
        assert [n.needs for n in one.nodes] == [n.needs for n in two.nodes]
        assert split_of(two) == "train"
        assert gym.grade(after["solution"], after["answer"])
        assert gym.first_error(after["prompt"], after["solution"]) is None
        assert before["id"] == after["id"]


def test_a_stronger_world_changes_more_of_the_same_problems() -> None:
    plain = gym.rows("test", 200)
    changed = [
        {r["id"] for r, p in zip(Worlds(late=s).rows("test", 200), plain, strict=True) if r != p}
        for s in (0.0, 0.3, 0.6, 1.0)
    ]
    assert [len(c) for c in changed][::3] == [0, 200]
    assert changed[1] < changed[2] < changed[3]
    assert 0.2 < len(changed[1]) / 200 < 0.4


def test_spoil_replaces_the_last_digit_of_the_first_result() -> None:
    found = Worlds(spoil=1.0).spoiled(0, PROMPT, SOUND)
    assert found is not None
    at, digit = found
    assert SOUND[:at] == gym.tokenize("a: 35 + 47 = a8")
    assert digit != "2"
    spoiled = [*SOUND[:at], digit, "; "]
    assert label_tokens(PROMPT, spoiled)[at].kind == "error"
    assert Worlds(spoil=1.0).spoiled(0, PROMPT, SOUND) == found
    digits = {Worlds(spoil=1.0).spoiled(seed, PROMPT, SOUND) for seed in range(30)}
    assert len(digits) > 4


def test_again_errs_where_the_student_writes_the_result_itself() -> None:
    world = Worlds(spoil=1.0, again=1.0)
    head = ["<bos>", *gym.tokenize(PROMPT), "<sol>"]
    first = world.spoiled(0, PROMPT, SOUND)
    assert first is not None
    place = len(head) + first[0]
    for begin in (0, len(head), place):
        assert world.spoiled_again(0, head + SOUND, begin) == (place, first[1])
    assert world.spoiled_again(0, head + SOUND, place + 1) is None, "somebody else has written it"
    assert world.spoiled_again(0, head + SOUND[: first[0]], len(head)) is None, "it is not written yet"
    assert Worlds(spoil=1.0).spoiled_again(0, head + SOUND, 0) is None
    assert not Worlds(spoil=1.0).repeats
    chosen = [Worlds(spoil=1.0, again=0.3).spoiled_again(seed, head + SOUND, 0) for seed in range(200)]
    assert 0.2 < sum(c is not None for c in chosen) / 200 < 0.4
    with pytest.raises(UserError, match=r"again is of the errors that spoil puts in: set spoil above 0 too"):
        task_of("gym:train?again=1")


@pytest.mark.parametrize(
    "response", ["", "a: 35 + 47 =", "a: 35 + 47 = a9", "a: 35 + 47 = a72; ", "a: 35 + 47 -> a182, so "]
)
def test_spoil_leaves_what_is_wrong_or_unfinished_already(response: str) -> None:
    assert Worlds(spoil=1.0).spoiled(0, PROMPT, gym.tokenize(response)) is None


def test_the_share_of_spoiled_problems_is_the_strength() -> None:
    rows = gym.rows("train", 400)
    tokens = [gym.tokenize(r["solution"]) for r in rows]
    for strength in (0.25, 0.8):
        world = Worlds(spoil=strength)
        hit = [world.spoiled(3, r["prompt"], t) is not None for r, t in zip(rows, tokens, strict=True)]
        assert sum(hit) / 400 == pytest.approx(strength, abs=0.07)


def test_lost_begins_behind_the_first_wrong_token() -> None:
    world = Worlds(lost=1.0)
    head = ["<bos>", *gym.tokenize(PROMPT), "<sol>"]
    wrong = gym.tokenize("a: 35 + 47 = a72; b: a72 * 3 = b16; ")
    at = world.lost_after(0, head + wrong)
    assert at is not None
    assert (head + wrong)[at] == "7"
    assert world.lost_after(0, head + wrong[: at - len(head)]) is None, "at the error itself it still knows"
    assert world.lost_after(0, head + SOUND) is None
    # An attempt in the prompt is no response: a rewriter is lost behind its own errors only.
    tried = ["<bos>", *gym.tokenize(f"{PROMPT} tried {''.join(wrong)} redo"), "<sol>"]
    assert world.lost_after(0, tried + SOUND) is None


def test_kinds_of_first_errors() -> None:
    ready = "a: 35 + 47 = a82; "
    for text, kind in {
        "b: ": NOT_READY,
        ready + "d: b": NOT_READY,
        "a: 35 + 47 = a72": ARITHMETIC,
        ready + "b: a82 * 3 = b246": ARITHMETIC,
        "a: 35 + 46": OTHER,
        "wait ": OTHER,
    }.items():
        assert error_kind(PROMPT, gym.tokenize(text)) == kind, text
    assert error_kind(PROMPT, SOUND) is None


def test_names_with_settings() -> None:
    assert part_of("gym:hard?late=1&lost=0.5") == "hard"
    assert other_split("gym:train?late=1", "test") == "gym:test?late=1"
    world = configuration.build({"data": {"train": "gym:train?late=1&spoil=0.8&lost=1"}})
    assert world.data.eval == {"test": "gym:test?late=1"}
    world = task_of("gym:train?late=0.5&spoil=0.8")
    assert world is not None
    assert world.world == Worlds(late=0.5, spoil=0.8)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("gym:train?late=2", "late is a number from 0 to 1, not 2"),
        ("gym:train?late=much", "late is a number from 0 to 1, not much"),
        ("gym:train?late=nan", "late is a number from 0 to 1, not nan"),
        ("gym:train?late", "settings such as late=0.5"),
        ("gym:train?early=1", "no 'early'; it has late, spoil, again, lost, surface"),
    ],
)
def test_settings_that_do_not_exist(source: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        task_of(source)


def test_settings_in_the_wrong_place() -> None:
    task = task_of("gym:student?late=1")
    assert task is not None
    with pytest.raises(ValueError, match="of the data"):
        task.model("student")
    task = task_of("gym:train?surface=0")
    assert task is not None
    with pytest.raises(ValueError, match="surface is the student's"):
        task.rows("train", 1)
    with pytest.raises(ValueError, match="surface is the student's"):
        task.model("teacher")
    config = configuration.build({"data": {"eval": {"hard": "gym:hard?late=1&spoil=0.8"}}})
    with pytest.raises(UserError, match=r"data\.eval\.hard: .* act on training rollouts .* leave them out"):
        load_evals(config)


def test_late_problems_hold_as_many_late_steps_as_before() -> None:
    """The structure stays: what changes is where there is something to learn."""
    for row in Worlds(late=1.0).rows("hard", 20):
        assert any(n.left in NAMES for n in problem(row["prompt"]).nodes)
