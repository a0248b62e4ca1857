"""The maze: its generator, its truth, its demonstrations."""

import random

import pytest

from onpath import config as configuration
from onpath.data.tasks import task_of
from onpath.gym.demos import text_of
from onpath.gym.maze.check import (
    HASTY,
    OTHER,
    VERDICT,
    error_kind,
    first_error,
    first_error_token,
    grade,
    label_tokens,
)
from onpath.gym.maze.demos import Beliefs, Walker, first_looks
from onpath.gym.maze.mixture import SHARES, TEMPLATES, Mixture
from onpath.gym.maze.tasks import SIZES, moves, parse_maze, random_maze, rows, split_of
from onpath.gym.maze.vocab import LANGUAGE
from onpath.system.errors import UserError

PROMPT = "b: #; a: bc; f: #; c: de; g: #; e: !; d: fg; a?"
WALK = "a: bc. b: #. b no. c: de. d: fg. c yes. go c. c: de. d: fg. f: #. g: #. d no. e: !. e yes. go e. out"


def kinds(walk: str) -> list[tuple[str, str]]:
    tokens = LANGUAGE.tokenize(walk)
    return list(zip(tokens, label_tokens(PROMPT, tokens), strict=True))


def test_a_maze_has_one_way_out() -> None:
    maze = parse_maze(PROMPT)
    assert maze is not None
    assert maze.text == PROMPT
    assert maze.way == "ce"
    assert [room for room, _ in maze.rooms if maze.opens(room)] == ["a", "c", "e"]


@pytest.mark.parametrize("split", sorted(SIZES))
def test_rows_are_mazes_of_their_split(split: str) -> None:
    made = rows(split, 40)
    assert made == rows(split, 80)[:40]
    for row in made:
        maze = parse_maze(row["prompt"])
        assert maze is not None
        assert split_of(maze) == split
        assert SIZES[split][0] <= len(maze.way) <= SIZES[split][1]
        assert row["answer"] == maze.way
        assert grade(row["solution"], row["answer"])
        assert LANGUAGE.decode(LANGUAGE.encode(row["prompt"])) == row["prompt"]


@pytest.mark.parametrize(
    "text",
    ["", "a?", "a: bc; b: #; a?", "a: bb; b: #; a?", "a: ab; b: !; a?", "a: bc; b: #; c: !; a: bc; a?"],
)
def test_what_is_no_maze(text: str) -> None:
    assert parse_maze(text) is None
    assert label_tokens(text, ["go ", "c"]) == ["error", "consequence"]


def test_a_right_walk_holds_no_error() -> None:
    assert grade(WALK, "ce")
    assert first_error(PROMPT, WALK) is None
    assert error_kind(PROMPT, LANGUAGE.tokenize(WALK)) is None
    assert {kind for _, kind in kinds(WALK)} == {"copied", "choice", "habit", "right"}
    assert [t for t, kind in kinds(WALK) if kind == "right"] == [" no", " yes", "c", " no", " yes", "e"]
    assert [t for t, kind in kinds(WALK) if kind == "choice"] == ["b: ", "d: "]


def test_behind_a_wrong_move_all_is_consequence() -> None:
    walk = "a: bc. go b. b: #. stuck"
    assert not grade(walk, "ce")
    assert kinds(walk) == [
        ("a: ", "copied"), ("b", "copied"), ("c", "copied"), (". ", "habit"), ("go ", "habit"),
        ("b", "error"), (". ", "habit"), ("b: ", "consequence"), ("#", "consequence"), (". ", "habit"),
        ("stuck", "consequence"),
    ]  # fmt: skip
    assert first_error(PROMPT, walk) == len("a: bc. ")


def test_a_wrong_verdict_can_be_taken_back() -> None:
    walk = WALK.replace("d no", "d open, wait d no")
    assert grade(walk, "ce")
    wrong = [(i, t) for i, (t, kind) in enumerate(kinds(walk)) if kind == "error"]
    assert [t for _, t in wrong] == [" open"]
    assert [kind for _, kind in kinds(walk)[wrong[0][0] + 1 :]].count("consequence") == 0


@pytest.mark.parametrize(
    ("walk", "kind"),
    [
        ("a: bc. go b", HASTY),
        ("a: bc. b: #. b yes", VERDICT),
        ("a: bd. ", OTHER),
        ("a: bc. f: #", OTHER),
        ("a: bc. out", OTHER),
        ("a: bc. stuck", OTHER),
        ("a: b. ", OTHER),
        ("a: bc. go b: #. b no. go c", OTHER),  # gone, but nowhere
        ("a: bc. go . b: #", OTHER),
        ("zebra", OTHER),
    ],
)
def test_kinds_of_first_errors(walk: str, kind: str) -> None:
    assert error_kind(PROMPT, LANGUAGE.tokenize(walk)) == kind


def test_grading_wants_the_moves_and_the_end() -> None:
    assert grade("go c. go e. out", "ce")
    assert grade(moves("ce"), "ce")
    assert not grade("go c. go e. ", "ce")
    assert not grade("go b. go c. go e. out", "ce")
    assert not grade("out", "ce")


def test_the_teacher_walks_right_and_the_student_errs_by_room() -> None:
    rng, beliefs = random.Random(0), Beliefs()
    right = 0
    for _ in range(60):
        maze = random_maze(rng, "test")
        walk = text_of(Walker().write(rng, maze))
        assert grade(walk, maze.way)
        assert first_error(maze.text, walk) is None
        assert LANGUAGE.decode(LANGUAGE.encode(walk)) == walk
        pieces = Walker(student_style=True, beliefs=beliefs).write(rng, maze)
        tokens = [token for token, _ in pieces]
        sound = first_error_token(maze.text, tokens) is None
        out = grade(text_of(pieces), maze.way)
        assert out or not sound  # a wrong verdict may do no harm
        right += out
    assert 10 < right < 50


def test_an_injected_error_is_shown_but_not_taught() -> None:
    rng = random.Random(1)
    writer = Walker(student_style=True, beliefs=Beliefs(), foreign=True, notice=0.5, noise=0.2)
    errors = backs = 0
    for _ in range(80):
        maze = random_maze(rng, "train")
        pieces = writer.write(rng, maze)
        labels = label_tokens(maze.text, [token for token, _ in pieces])
        for (token, trained), kind in zip(pieces, labels, strict=True):
            believed = kind == "error" and token not in (" yes", " open") and trained
            assert not (kind == "habit" and trained and token in ("take ", ", ", " | "))
            errors += kind == "error" and not trained
            # Having said that a dead end leads on, the writer goes there: that is taught.
            assert not believed or "yes" in text_of(pieces) or "open" in text_of(pieces)
        backs += any(token == "wait " for token, _ in pieces)
    assert errors > 30
    assert backs > 5


def test_a_rewrite_looks_where_the_attempt_looked() -> None:
    rng = random.Random(2)
    for _ in range(20):
        maze = random_maze(rng, "test")
        attempt = text_of(Walker().write(rng, maze))
        again = LANGUAGE.tokenize(text_of(Walker(student_style=True).write(rng, maze, attempt)))
        parent = {door: room for room, _ in maze.rooms for door in maze.behind(room)}
        wanted = first_looks(maze, attempt)
        looked = [t[0] for t, k in zip(again, label_tokens(maze.text, again), strict=True) if k == "choice"]
        assert len(looked) >= 4
        assert [wanted[parent[room]] for room in looked] == looked


def test_the_mixture_fits_the_models_context() -> None:
    rng = random.Random(3)
    for role in SHARES:
        mixture = Mixture(role)
        for progress in (0.0, 0.5, 1.0):
            for _ in range(40):
                prompt, pieces = mixture.draw(rng, progress)
                assert len(LANGUAGE.encode(prompt)) + len(pieces) + 2 <= LANGUAGE.longest
    assert set(TEMPLATES) == {"hint", "rewrite", "rewrite_with_reference"}


def test_the_gyms_models_do_not_know_its_language() -> None:
    with pytest.raises(UserError, match="use maze:student"):
        configuration.build({"data": {"train": "maze:train"}})


def test_it_is_a_task() -> None:
    task = task_of("maze:train")
    assert task is not None
    row = next(iter(task.rows("test", 1)))
    assert task.grade(task.stated(row["answer"]), row["answer"])
    assert task.labels(row["prompt"], ["go "]) == ["habit"]
