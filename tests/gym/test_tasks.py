"""Problems, splits and reference solutions."""

import random
import re

import pytest

from onpath import gym
from onpath.gym.tasks import (
    SIZES,
    belongs,
    count_orders,
    make_problem,
    parse_problem,
    random_order,
    random_problem,
    solution,
    split_of,
)


def evaluate(prompt: str) -> int:
    """The target's value by Python's own arithmetic."""
    *definitions, question = prompt.split("; ")
    known: dict[str, int] = {}
    for definition in definitions:
        name, expression = definition.split(": ")
        known[name] = eval(re.sub(r"\b0(\d)", r"\1", expression), {}, known) % 100
    return known[question[0]]


@pytest.mark.parametrize("split", sorted(SIZES))
def test_answers_equal_pythons_own(split: str) -> None:
    for row in gym.rows(split, 200):
        assert int(row["answer"]) == evaluate(row["prompt"])
        assert gym.grade(row["solution"], row["answer"])
        assert gym.first_error(row["prompt"], row["solution"]) is None


def test_rows_are_a_function_of_split_and_seed() -> None:
    assert gym.rows("test", 20) == gym.rows("test", 20)
    assert gym.rows("test", 20) == gym.rows("test", 40)[:20]
    assert gym.rows("test", 20, seed=1) != gym.rows("test", 20)
    assert gym.rows("test", 1)[0]["prompt"] == "e: 57 - 95; f: e * 2; h: 68 - f; d: h + f; c: d + 50; c?"
    assert len({r["id"] for s in (0, 1) for r in gym.rows("test", 50, seed=s)}) == 100


def test_splits_cannot_overlap() -> None:
    seen: dict[str, str] = {}
    for split in SIZES:
        for seed in (0, 1):
            for row in gym.rows(split, 400, seed):
                problem = parse_problem(row["prompt"])
                assert problem is not None
                assert belongs(problem, split)
                assert split_of(problem) == {"hard_validation": "train"}.get(split, split)
                assert seen.setdefault(problem.canonical(), split) == split
    for split in ("hard", "hard_validation"):
        assert {len(parse_problem(r["prompt"]).nodes) for r in gym.rows(split, 100)} == {6, 7}  # type: ignore[union-attr]


def test_canonical_ignores_names_order_and_the_sides_of_plus() -> None:
    one = parse_problem("a: 35 + 47; b: 62 - 10; c: a + b; c?")
    two = parse_problem("d: 62 - 10; f: 47 + 35; h: d + f; h?")
    other = parse_problem("a: 35 + 47; b: 10 - 62; c: a + b; c?")
    assert one is not None
    assert two is not None
    assert other is not None
    assert one.canonical() == two.canonical() != other.canonical()


def test_the_target_needs_every_node() -> None:
    rng = random.Random(0)
    for size in (1, 2, 3, 5, 7):
        for _ in range(100):
            problem = make_problem(rng, size)
            needed = {problem.target}
            for node in reversed(problem.nodes):
                if node.name in needed:
                    needed |= node.needs
            assert len(problem.nodes) == size
            assert needed == set(problem.by_name)


def test_orders_are_counted_and_every_order_is_a_derivation() -> None:
    problem = parse_problem("a: 35 + 47; b: a * 3; c: 62 - a; d: b + c; d?")
    assert problem is not None
    assert count_orders(problem) == 2
    rng = random.Random(0)
    orders = {"".join(random_order(rng, problem)) for _ in range(50)}
    assert orders == {"abcd", "acbd"}
    for order in orders:
        assert gym.grade(solution(problem, list(order)), problem.answer)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="not 'dev'"):
        gym.rows("dev", 1)


@pytest.mark.parametrize(
    "text", ["", "a?", "a: b + 12; a?", "a: 12 + 13; a: 14 + 15; a?", "x", "a: 1 + 2; b?"]
)
def test_a_text_without_a_problem_gives_none(text: str) -> None:
    assert parse_problem(text) is None


def test_drills_stay_in_training() -> None:
    rng = random.Random(0)
    assert all(split_of(random_problem(rng, "train", (1, 2))) == "train" for _ in range(200))
