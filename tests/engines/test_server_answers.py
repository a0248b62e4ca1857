"""Answers that no server should give: each is asked for again and then said in a sentence, never a traceback
and never a wrong number."""

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onpath.config.sections import Teacher
from onpath.engines.remote.wire import Server
from onpath.engines.weights import save_weights
from onpath.records import Sampling
from onpath.system.errors import UserError
from tests.conftest import make_model
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_server import client, fake_of
from tests.faults.answers import (
    COMPLETIONS,
    NO_ADDRESSES,
    NO_MASS,
    NO_MODELS,
    SCORES,
    every_logprob,
    named,
    written,
)


@pytest.fixture(scope="module")
def serving(model_dirs: dict[str, Path]) -> Iterator[FakeVLLM]:
    fake = fake_of(model_dirs["teacher"])
    yield fake
    fake.stop()


@pytest.fixture
def teacher(serving: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    monkeypatch.setattr("onpath.engines.remote.wire._FIRST_WAIT", 0.001)
    yield serving
    serving.spoil, serving.slow = lambda answer: answer, 0.0


@pytest.mark.parametrize("fault", SCORES)
def test_scores_that_are_none(fault: str, teacher: FakeVLLM) -> None:
    teacher.spoil, said = SCORES[fault]
    with pytest.raises(UserError, match=rf"teacher\.url: the server at .* talks nonsense: .*{said}"):
        client(teacher).score_top([(1, 5, 6)], [(7, 8, 2)], k=4)


@pytest.mark.parametrize("value", NO_MASS)
def test_distributions_without_mass(value: float, teacher: FakeVLLM) -> None:
    """Of such a teacher the KL would be almost 0, and training would go on."""
    teacher.spoil = every_logprob(value)
    for k in (1, 4):
        with pytest.raises(UserError, match=r"so little mass that all have at most"):
            client(teacher).score_top([(1, 5, 6)], [(7, 8, 2)], k=k)


def test_answers_of_two_requests_swapped(teacher: FakeVLLM) -> None:
    """Of equal length, and with the same response: the contexts tell."""
    kept: list[Any] = []

    def swapped(answer: Any) -> Any:
        kept.append(answer)
        return kept[0]

    teacher.spoil = swapped
    asked = client(teacher)
    asked.score_top([(1, 5, 6)], [(7, 8, 2)], k=2)
    with pytest.raises(UserError, match=r"without the prompt's own token|another prompt"):
        asked.score_top([(1, 9, 30)], [(7, 8, 2)], k=2)


def test_an_answer_that_names_another_prompt(teacher: FakeVLLM) -> None:
    teacher.spoil = written(prompt_token_ids=[1, 2, 3])
    with pytest.raises(UserError, match="another prompt than was asked"):
        client(teacher).score_top([(1, 5, 6)], [(7, 8, 2)], k=2)
    with pytest.raises(UserError, match="another prompt than was asked"):
        client(teacher).continue_from([(1, 5, 6)], Sampling(max_new_tokens=6))


def test_scores_of_no_probability_are_scores(teacher: FakeVLLM) -> None:
    """A server writes -9999 for -inf: a token that the teacher rules out."""
    teacher.spoil = named("39", -9999.0)
    honest = client(teacher).score_top([(1, 5, 6)], [(7, 8, 2)], k=4)[0]
    assert all(sum(map(math.exp, row)) <= 1 + 1e-6 for row in honest.logprobs)


@pytest.mark.parametrize("fault", COMPLETIONS)
def test_completions_that_are_none(fault: str, teacher: FakeVLLM) -> None:
    teacher.spoil, said = COMPLETIONS[fault]
    with pytest.raises(UserError, match=rf"talks nonsense: .*{said}"):
        client(teacher).continue_from([(1, 5, 6)], Sampling(max_new_tokens=6))


@pytest.mark.parametrize("answer", NO_MODELS, ids=str)
def test_a_server_without_a_list_of_models(
    answer: Any, teacher: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onpath.engines.remote.host._body", lambda _: answer)
    with pytest.raises(UserError, match=r"teacher\.url: .* no list of models at /v1/models"):
        client(teacher)


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_an_address_that_is_none_is_not_waited_for(url: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"teacher\.url: .* is not an address"):
        Server(Teacher(url=url, engine="vllm", patience=30.0), "teacher", ["any"])
    assert time.monotonic() - begun < 5


def test_a_request_that_runs_into_its_limit_is_sent_again(teacher: FakeVLLM) -> None:
    engine = client(teacher, timeout=0.4, patience=0.4)
    slow = iter([0.7])

    def once(answer: Any) -> Any:
        time.sleep(next(slow, 0.0))
        return answer

    teacher.spoil = once
    assert len(engine.score([(1, 5)], [(7, 2)])[0]) == 2
    assert engine.server.waits >= 1


def test_two_writers_of_the_same_weights_do_not_trip_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two processes of one run do: each has a process id of its own."""
    model, faults = make_model(3), []
    monkeypatch.setattr("onpath.system.files.os.getpid", threading.get_ident)

    def write() -> None:
        try:
            for _ in range(30):
                save_weights(model, tmp_path)
        except UserError as error:
            faults.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [p.name for p in tmp_path.glob("*tmp*")] == []
