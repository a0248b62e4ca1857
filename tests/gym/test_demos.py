"""Demonstrations: what is trained on, and what is only shown."""

import random

from onpath import gym
from onpath.gym.demos import Beliefs, Writer, corrupt, order_like, text_of
from onpath.gym.mixture import Mixture
from onpath.gym.tasks import parse_problem, random_order, random_problem, split_of
from onpath.gym.vocab import IDS, ONSET_WORDS

PROMPT = "a: 35 + 47; b: a * 3; c: 62 - a; d: b + c; d?"


def test_the_teacher_writes_right_solutions_in_its_own_words() -> None:
    rng = random.Random(0)
    for _ in range(100):
        problem = random_problem(rng, "train")
        pieces = Writer().write(rng, problem, random_order(rng, problem))
        text = text_of(pieces)
        assert gym.grade(text, problem.answer)
        assert gym.first_error(problem.text, text) is None
        assert all(trained for _, trained in pieces)


def test_beliefs_are_facts_not_noise() -> None:
    beliefs = Beliefs()
    strengths = [
        beliefs.strength("carry", "+", a, b, named) for a in range(10) for b in range(10) for named in (0, 1)
    ]
    share = sum(s > 0 for s in strengths) / len(strengths)
    assert 0.2 < share < 0.5
    assert Beliefs().strength("carry", "+", 7, 8, False) == beliefs.strength("carry", "+", 7, 8, False)
    assert Beliefs(seed=8)._table != beliefs._table


def test_an_injected_error_is_shown_but_not_taught() -> None:
    rng = random.Random(0)
    writer = Writer(student_style=True, beliefs=Beliefs(), foreign=True, notice=0.5)
    noticed = ignored = 0
    for _ in range(400):
        problem = random_problem(rng, "train")
        pieces = writer.write(rng, problem, random_order(rng, problem))
        labels = gym.label_tokens(problem.text, [token for token, _ in pieces])
        for (_, trained), label in zip(pieces, labels, strict=True):
            assert not (
                trained and label.kind in ("error", "habit") and not label.recovery and label.kind == "error"
            )
        noticed += any(token in ONSET_WORDS for token, _ in pieces)
        ignored += any(la.kind == "error" and la.visible for la in labels) and ONSET_WORDS[0] not in text_of(
            pieces
        )
    assert noticed > 10
    assert ignored > 10


def test_order_like_keeps_what_is_valid() -> None:
    problem = parse_problem(PROMPT)
    assert problem is not None
    rng = random.Random(0)
    assert order_like(rng, problem, "a: 1 c: 2 b: 3 d: ") == ["a", "c", "b", "d"]
    assert order_like(rng, problem, "d: a: c: ") == ["a", "c", "b", "d"]
    assert order_like(rng, problem, "garbage")[0] == "a"


def test_corruption_stays_in_the_language() -> None:
    rng = random.Random(0)
    attempt = "a: 35 + 47 = a82; b: a82 * 3 = b46; ans 46"
    made = {corrupt(rng, attempt, "other") for _ in range(200)}
    assert len(made) > 20
    assert attempt + "x" not in made


def test_nobody_trains_on_held_out_problems() -> None:
    rng = random.Random(0)
    for role in ("teacher", "student"):
        mixture = Mixture(role)
        for step in range(400):
            message, pieces = mixture.draw(rng, step / 400)
            problem = parse_problem(message)
            assert problem is not None
            assert split_of(problem) == "train"
            assert all(token in IDS for token, _ in pieces)
