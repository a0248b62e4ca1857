"""Drafts make continuations cheaper and change nothing: right ones, wrong ones, none, too many."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from onpath.data.batch import collate
from onpath.data.render import Renderer
from onpath.engines import hf
from onpath.engines.decoding import branches
from onpath.engines.decoding.branches import Past, branch
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.hf import HFEngine
from onpath.engines.teacher import ModelTeacher
from onpath.records import Completion, Sampling, Trajectory
from onpath.system.errors import UserError

K = 21
CONTEXT = 5
PLACES = [(row, length) for row in range(4) for length in range(CONTEXT, 20, 3 + row)]
KEYS = [f"{row}/{length}" for row, length in PLACES]

Propose = Callable[["Counted", int, int, Sequence[int]], list[int]]


class Counted:
    """An engine whose forward passes are counted, and four rows that it has scored."""

    def __init__(self, directory: Path, stop_ids: frozenset[int]) -> None:
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert isinstance(model, Qwen3ForCausalLM)
        renderer = Renderer(AutoTokenizer.from_pretrained(directory))
        self.engine = HFEngine(model.eval(), renderer, stop_ids=stop_ids)
        generator = torch.Generator().manual_seed(5)
        self.rows = [tuple(torch.randint(4, 40, (25,), generator=generator).tolist()) for _ in range(4)]
        trajectories = [
            Trajectory(student_context=r[:CONTEXT], teacher_context=r[:CONTEXT], response=r[CONTEXT:])
            for r in self.rows
        ]
        batch = collate(trajectories)
        self.past = Past(model, [batch])
        ModelTeacher(model).hidden(batch, self.past.parts[0])
        self.passes = 0
        model.get_decoder().register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1

    def generate(self, sampling: Sampling, drafts: Sequence[Drafts] | None) -> list[Completion]:
        self.passes = 0
        return branch(self.engine, self.past, PLACES, sampling, keys=KEYS, drafts=drafts)


class Planted(Drafts):
    """Drafts by a function of (row, prefix length, generated)."""

    def __init__(self, row: int, counted: Counted, by: Propose) -> None:
        self.row, self.counted, self.by = row, counted, by

    def propose(self, *, prefix_length: int, generated: Sequence[int], max_tokens: int) -> list[int]:
        return self.by(self.counted, self.row, prefix_length, generated)[:max_tokens]


@pytest.fixture(params=[frozenset({2}), frozenset(range(2, 12))], ids=["rarely ends", "often ends"])
def counted(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> Counted:
    return Counted(model_dirs["teacher"], request.param)


GREEDY: dict[tuple[int, ...], int] = {}
"""The likeliest next token of every prefix asked for; one model in all of these tests."""


def greedy_rest(counted: Counted, row: int, length: int, generated: Sequence[int]) -> list[int]:
    """What the model will generate, by reading everything anew."""
    prefix = (*counted.rows[row][:length], *generated)
    for _ in range(7):
        if prefix not in GREEDY:
            with torch.no_grad():
                GREEDY[prefix] = int(counted.engine.model(torch.tensor([prefix])).logits[0, -1].argmax())
        prefix = (*prefix, GREEDY[prefix])
    return list(prefix[length + len(generated) :])


def often_right(counted: Counted, row: int, length: int, generated: Sequence[int]) -> list[int]:
    right = greedy_rest(counted, row, length, generated)
    return [(token + (i == (row + length) % 4)) % 40 for i, token in enumerate(right)]


PROPOSALS: dict[str, Propose] = {
    "right": greedy_rest,
    "often right": often_right,
    "wrong": lambda *_: [3] * 7,
    "none": lambda *_: [],
    "of different lengths": lambda c, row, n, w: greedy_rest(c, row, n, w)[: row * 2],
    "no tokens of the model": lambda *_: [-1] * 7,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", PROPOSALS)
def test_drafts_do_not_change_what_is_generated(name: str, temperature: float, counted: Counted) -> None:
    sampling = Sampling(temperature=temperature, max_new_tokens=K, seed=3)
    expected = counted.engine.continue_from(
        [counted.rows[row][:length] for row, length in PLACES], sampling, keys=KEYS
    )
    found = counted.generate(sampling, [Planted(row, counted, PROPOSALS[name]) for row in range(4)])
    assert [c.ids for c in found] == [c.ids for c in expected]
    assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_right_drafts_save_passes(model_dirs: dict[str, Path]) -> None:
    counted = Counted(model_dirs["teacher"], frozenset({2}))
    sampling = Sampling(temperature=0.0, max_new_tokens=K)
    plain = counted.generate(sampling, None)
    assert counted.passes == K
    known = {place: list(c.ids) for place, c in zip(PLACES, plain, strict=True)}
    drafts = [Planted(row, counted, lambda _, r, n, w: known[r, n][len(w) :]) for row in range(4)]
    assert counted.generate(sampling, drafts) == plain
    assert counted.passes == 3  # eight tokens each: 7 drafted and the one after them


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ([], [10, 11, 12]),  # from the place on
        ([30], [11, 12, 13]),  # went its own way: the same distance on
        ([30, 31], [12, 13, 14]),
        ([0, 2, 3], [14, 15, 16]),  # 2, 3 stand at 2 and at 12: 14 is nearer to where it would be
        ([30, 9], [10, 11, 12]),  # 9 stands at 9
        ([30] * 10, []),  # past the end
    ],
)
def test_drafts_follow_the_text_back(generated: list[int], expected: list[int]) -> None:
    response = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 1, 2, 3, 4, 5, 6]
    drafts = Drafts(start=100, response=response, likeliest=list(range(17)))
    assert drafts.propose(prefix_length=110, generated=generated, max_tokens=3) == expected


def test_a_response_of_one_token_has_drafts() -> None:
    drafts = Drafts(start=2, response=[7], likeliest=[5])
    assert drafts.propose(prefix_length=2, generated=[], max_tokens=4) == [5]
    assert drafts.propose(prefix_length=2, generated=[8], max_tokens=4) == []


def rewrites_of(counted: Counted) -> tuple[list[tuple[int, ...]], list[Drafts]]:
    """Rewrite prompts of unequal length, and attempts that the model half agrees with."""
    prompts = [row[: CONTEXT + 2 * i] for i, row in enumerate(counted.rows)]
    attempts = []
    for i, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(K):
            with torch.no_grad():
                text.append(int(counted.engine.model(torch.tensor([text])).logits[0, -1].argmax()))
        attempt = text[len(prompt) :]
        attempt[3 + i] = (attempt[3 + i] + 1) % 40
        attempts.append(Drafts.of_text(attempt, start=len(prompt)))
    return prompts, attempts


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=0.6, top_p=0.95)])
@pytest.mark.parametrize("batch_tokens", [32_768, 60])
def test_an_answer_that_repeats_a_text_is_the_same_in_fewer_passes(
    sampling: Sampling, batch_tokens: int, counted: Counted
) -> None:
    counted.engine.batch_tokens = batch_tokens
    prompts, attempts = rewrites_of(counted)
    sampling = replace(sampling, max_new_tokens=K, seed=4)
    keys = [f"rewrite {i}" for i in range(len(prompts))]
    counted.passes = 0
    expected = counted.engine.continue_from(prompts, sampling, keys=keys)
    before, counted.passes = counted.passes, 0
    found = counted.engine.answer([], prompts, sampling, keys=keys, drafts=attempts)
    assert [(c.ids, c.finish_reason) for c in found] == [(c.ids, c.finish_reason) for c in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    if sampling.temperature == 0 and max(len(c.ids) for c in expected) == K:
        assert counted.passes < 0.75 * before


@pytest.mark.parametrize("together", [16, 3])
@pytest.mark.parametrize("batch_tokens", [32_768, 60])
def test_what_was_read_while_it_was_written_is_what_a_pass_over_it_reads(
    batch_tokens: int, together: int, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "_READ_TOGETHER", together)
    counted.engine.batch_tokens = batch_tokens
    prompts, drafts = rewrites_of(counted)
    sampling, keys = Sampling(temperature=0.6, max_new_tokens=K, seed=4), [str(i) for i in range(4)]
    for draft in drafts[1:]:
        draft.keeps = True
    done = counted.engine.answer([], prompts, sampling, keys=keys, drafts=drafts)
    assert drafts[0].read is None, "nobody asked"
    for prompt, c, draft in [*zip(prompts, done, drafts, strict=True)][1:]:
        batch = collate([Trajectory(student_context=prompt, teacher_context=prompt, response=c.ids)])
        expected = ModelTeacher(counted.engine.model).hidden(batch)
        assert draft.read is not None
        torch.testing.assert_close(draft.read, expected, atol=2e-5, rtol=1e-4)


def test_under_autocast_of_float32_weights_nothing_is_kept(counted: Counted) -> None:
    """The scoring pass reads them as they are."""
    counted.engine.bf16 = True
    prompts, drafts = rewrites_of(counted)
    for draft in drafts:
        draft.keeps = True
    counted.engine.answer([], prompts, Sampling(max_new_tokens=K), keys=[""] * 4, drafts=drafts)
    assert [draft.read for draft in drafts] == [None] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_said(temperature: float, counted: Counted) -> None:
    with torch.no_grad():
        counted.engine.model.lm_head.weight[7] = torch.nan
    with pytest.raises(UserError, match="logits are not finite"):
        counted.generate(Sampling(temperature=temperature, max_new_tokens=3), None)


def test_on_a_cpu_large_models_follow_no_drafts(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over them costs what its tokens cost, rejected ones too. What is read is kept all the same."""
    prompts, drafts = rewrites_of(counted)
    sampling, keys = Sampling(temperature=0.0, max_new_tokens=K), [""] * 4
    expected = counted.engine.continue_from(prompts, sampling, keys=keys)
    drafts[0].keeps = True
    monkeypatch.setattr(branches, "_WORTH_DRAFTS", 1e3)
    counted.passes = 0
    found = counted.engine.answer([], prompts, sampling, keys=keys, drafts=drafts)
    assert [c.ids for c in found] == [c.ids for c in expected]
    assert counted.passes == 1 + max(len(c.ids) for c in found), "one reads the prompts"
    assert drafts[0].read is not None
    assert len(drafts[0].read) == len(found[0].ids)
