"""The engine against the model itself, against transformers, and against an independent computation."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from onpath.data.render import Renderer
from onpath.engines import hf
from onpath.engines.decoding.draw import draw, truncate
from onpath.engines.head import check_head, evaluating, generating, unwrapped
from onpath.engines.hf import HFEngine
from onpath.losses import TokenStats, token_stats
from onpath.records import Prompt, Rollout, Sampling
from onpath.system.draws import noise
from onpath.system.errors import UserError
from tests.conftest import make_model

PROMPTS = [Prompt(id=str(i), text="9" * (1 + 5 * (i % 3)) + f"+{i}=?") for i in range(7)]
SAMPLING = Sampling(max_new_tokens=24, seed=5)


def lora(model: nn.Module, *, scale: float = 0.5) -> nn.Module:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft asks transformers for a name that transformers has renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=scale)
    return adapted.eval()


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> HFEngine:
    return make_engine(make_model(0), tokenizer)


@pytest.fixture(params=["full", "lora"])
def any_engine(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> HFEngine:
    model: nn.Module = make_model(0)
    return make_engine(lora(model) if request.param == "lora" else model, tokenizer)


def make_engine(model: nn.Module, tokenizer: PreTrainedTokenizerFast, **options: object) -> HFEngine:
    return HFEngine(model, Renderer(tokenizer), **{"stop_ids": frozenset({2}), **options})  # type: ignore[arg-type]


def reference_logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """[T, V] of one sequence, no padding, no cache, float64."""
    with torch.no_grad():
        return unwrapped(model)(input_ids=torch.tensor([list(ids)])).logits[0].double()


def reference_logps(model: nn.Module, context: Sequence[int], response: Sequence[int]) -> list[float]:
    logp_TV = reference_logits(model, [*context, *response]).log_softmax(-1)
    return [float(logp_TV[len(context) - 1 + t, token]) for t, token in enumerate(response)]


def plain(rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
    return [r.ids for r in rollouts]


# Log-probs.


@pytest.mark.parametrize("which", ["of unequal length", "of one length", "alone"])
def test_logprobs_are_the_models_own(any_engine: HFEngine, which: str) -> None:
    """Left-padded and not, with an adapter and without."""
    prompts = {"of unequal length": PROMPTS, "of one length": PROMPTS[::3], "alone": PROMPTS[:1]}[which]
    rollouts = any_engine.generate(prompts, SAMPLING)
    assert len({len(r.ids) for r in rollouts}) > 1 or which == "alone"
    for r in rollouts:
        assert r.context == any_engine.renderer.ids(r.prompt)
        assert r.logprobs == pytest.approx(reference_logps(any_engine.model, r.context, r.ids), abs=2e-5)
    assert min(min(r.logprobs) for r in rollouts) < -2, "this fixture would hide an error"


def absolute_positions() -> GPT2LMHeadModel:
    """Rotary embeddings only see distances; these would tell a position that counts padding."""
    torch.manual_seed(4)
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def test_positions_do_not_count_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make_engine(absolute_positions(), tokenizer)
    check_head(engine.model, "student.model")
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert len({len(r.context) for r in rollouts}) > 1
    scores = engine.score([r.context for r in rollouts], [r.ids for r in rollouts])
    for r, scored in zip(rollouts, scores, strict=True):
        expected = reference_logps(engine.model, r.context, r.ids)
        assert r.logprobs == pytest.approx(expected, abs=2e-5)
        assert scored == pytest.approx(expected, abs=2e-5)
    alone = [engine.generate([p], SAMPLING)[0].ids for p in PROMPTS]
    assert alone == plain(rollouts)


def test_the_adapter_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    model = lora(make_model(0))
    engine = make_engine(model, tokenizer)
    adapted = engine.generate(PROMPTS, SAMPLING)
    with model.disable_adapter():
        base = engine.generate(PROMPTS, SAMPLING)
    assert plain(adapted) != plain(base)
    assert plain(base) == plain(make_engine(make_model(0), tokenizer).generate(PROMPTS, SAMPLING))


def test_scores_are_the_models_own(any_engine: HFEngine) -> None:
    contexts = [any_engine.renderer.ids(p) for p in PROMPTS]
    responses = [tuple(range(5, 5 + n)) for n in (3, 1, 7, 2, 9, 4, 1)]
    found = any_engine.score(contexts, responses)
    for context, response, scores in zip(contexts, responses, found, strict=True):
        assert scores == pytest.approx(reference_logps(any_engine.model, context, response), abs=2e-5)


def test_scores_of_samples_are_their_logprobs(engine: HFEngine) -> None:
    rollouts = engine.generate(PROMPTS, SAMPLING, n=2)
    for r, scores in zip(
        rollouts, engine.score([r.context for r in rollouts], [r.ids for r in rollouts]), strict=True
    ):
        assert scores == pytest.approx(r.logprobs, abs=2e-5)


def test_scores_are_formed_under_autocast(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the head then multiplies as it does while it generates; on a CPU its numbers are the same."""
    seen = []

    def spy(**inputs: Any) -> TokenStats:
        seen.append(torch.is_autocast_enabled("cpu"))
        return token_stats(**inputs)

    monkeypatch.setattr(hf, "token_stats", spy)
    for half in (False, True):
        make_engine(make_model(0), tokenizer, bf16=half).score([(1, 5)], [(4, 2)])
    assert seen == [False, True]


def casts_of_weights(run: Any) -> int:
    """How often a matrix is cast to bfloat16; what flows through a model has three dimensions."""

    class Counted(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            casts = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to)
            self.found += casts and made.dim() == 2 and made.dtype == torch.bfloat16
            return made

    with Counted() as counted:
        run()
    return counted.found


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_under_autocast_weights_are_cast_once(
    adapted: bool, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not anew for every token; what is generated is the same, bit for bit, and the weights are as before."""
    model: nn.Module = lora(make_model(0)) if adapted else make_model(0).train()
    engine = make_engine(model, tokenizer, bf16=True)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    short, long = replace(SAMPLING, max_new_tokens=2), replace(SAMPLING, max_new_tokens=20)
    asked = [engine.renderer.ids(p) for p in PROMPTS]
    engine.stop_ids, engine._stop = frozenset(), torch.tensor([], dtype=torch.long)
    casts = {
        s.max_new_tokens: casts_of_weights(lambda s=s: engine.continue_from(asked, s)) for s in (short, long)
    }
    assert casts[2] == casts[20] > 0
    found = engine.continue_from(asked, long)
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before
    monkeypatch.setattr(hf, "generating", lambda model, bf16: evaluating(model))  # each token casts
    assert engine.continue_from(asked, long) == found
    assert casts_of_weights(lambda: engine.continue_from(asked, long)) > 5 * casts[20]


def test_weights_come_back_when_generating_fails() -> None:
    model = make_model(0)
    before = dict(model.named_parameters())
    seen: set[torch.dtype] = set()

    def fails() -> None:
        with generating(model, bf16=True):
            seen.update(p.dtype for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert seen == {torch.bfloat16}
    assert all(p is before[name] for name, p in model.named_parameters())


def test_bf16_logprobs_are_near(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make_engine(make_model(0), tokenizer, bf16=True)
    rollouts = engine.generate(PROMPTS, SAMPLING)
    for r, scores in zip(
        rollouts, engine.score([r.context for r in rollouts], [r.ids for r in rollouts]), strict=True
    ):
        assert r.logprobs == pytest.approx(reference_logps(engine.model, r.context, r.ids), abs=0.15)
        assert scores == pytest.approx(r.logprobs, abs=0.15)
    exact = make_engine(make_model(0), tokenizer).generate(PROMPTS, SAMPLING)
    assert any(a.logprobs[0] != b.logprobs[0] for a, b in zip(rollouts, exact, strict=True)), (
        "autocast was off"
    )


# The same request gives the same tokens.


def test_samples_do_not_depend_on_the_batch(any_engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = any_engine.generate(PROMPTS, SAMPLING, n=2)
    for batch_tokens in (1, 150):
        any_engine.batch_tokens = batch_tokens
        found = any_engine.generate(PROMPTS, SAMPLING, n=2)
        assert plain(found) == plain(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)
            assert (a.prompt, a.sample, a.finish_reason) == (b.prompt, b.sample, b.finish_reason)
    assert len({r.finish_reason for r in expected}) == 2
    order = [4, 2, 6, 0, 5, 1, 3]
    shuffled = any_engine.generate([PROMPTS[i] for i in order], SAMPLING, n=2)
    assert plain(shuffled) == [expected[2 * i + s].ids for i in order for s in range(2)]
    for below in (0.0, 1.0):  # never, and at once
        monkeypatch.setattr(hf, "_COMPACT_BELOW", below)
        assert plain(any_engine.generate(PROMPTS, SAMPLING, n=2)) == plain(expected)


def test_batches_hold_their_budget_longest_first(engine: HFEngine) -> None:
    engine.batch_tokens = 100
    lengths = [3, 30, 5, 29, 80, 4, 4]
    batches = list(engine._batches(lengths, 20))
    assert sorted(i for rows in batches for i in rows) == list(range(7))
    longest = [max(lengths[i] for i in rows) for rows in batches]
    assert longest == sorted(longest, reverse=True)
    assert all(
        len(rows) == 1 or len(rows) * (m + 20) <= 100 for rows, m in zip(batches, longest, strict=True)
    )
    assert len(batches) < 7


def test_n_samples_differ_and_nest(engine: HFEngine) -> None:
    four = engine.generate(PROMPTS[:2], SAMPLING, n=4)
    assert [(r.prompt.id, r.sample) for r in four] == [(p, s) for p in "01" for s in range(4)]
    assert len(set(plain(four))) == 8
    two = engine.generate(PROMPTS[:2], SAMPLING, n=2)
    assert plain(two) == plain([four[0], four[1], four[4], four[5]]), (
        "more samples leave the first ones alone"
    )


def test_seeds_and_keys_name_the_draw(engine: HFEngine) -> None:
    first = plain(engine.generate(PROMPTS, SAMPLING))
    assert plain(engine.generate(PROMPTS, SAMPLING)) == first
    assert plain(engine.generate(PROMPTS, replace(SAMPLING, seed=6))) != first
    keyed = plain(engine.generate(PROMPTS, SAMPLING, keys=[f"step 3/{i}" for i in range(7)]))
    assert keyed != first
    assert plain(engine.generate(PROMPTS, SAMPLING, keys=[p.id for p in PROMPTS])) == first
    torch.manual_seed(99)
    assert plain(engine.generate(PROMPTS, SAMPLING)) == first, "torch's own generator has no part in it"


def test_noise_is_uniform_and_its_beginning_does_not_depend_on_its_length() -> None:
    assert noise(1, "a", 50)[:20].tolist() == noise(1, "a", 20).tolist()
    assert noise(1, "a", 9).tolist() != noise(2, "a", 9).tolist() != noise(2, "b", 9).tolist()
    many = noise(0, "x", 20_000)
    assert 0 <= many.min() < many.max() < 1
    counts = torch.histc(torch.from_numpy(many), 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < chi2.ppf(0.999, 19)


def test_longer_limits_leave_the_beginning_alone(engine: HFEngine) -> None:
    short = engine.generate(PROMPTS, replace(SAMPLING, max_new_tokens=6))
    long = engine.generate(PROMPTS, replace(SAMPLING, max_new_tokens=30))
    assert all(b.ids[: len(a.ids)] == a.ids for a, b in zip(short, long, strict=True))


# How a response ends.


def test_finish_reasons_and_the_stop_token(engine: HFEngine) -> None:
    rollouts = engine.generate(PROMPTS, SAMPLING, n=6)
    for r in rollouts:
        ended = r.ids[-1] == 2
        assert 2 not in r.ids[:-1]
        assert r.finish_reason == ("stop" if ended else "length")
        assert ended or len(r.ids) == SAMPLING.max_new_tokens
        assert len(r.logprobs) == len(r.ids)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    assert len({len(r.ids) for r in rollouts}) > 4


def test_every_stop_id_ends_a_response(tokenizer: PreTrainedTokenizerFast) -> None:
    stops = frozenset({2, 7, 30})
    model = make_model(0)
    one, three = make_engine(model, tokenizer), make_engine(model, tokenizer, stop_ids=stops)
    ends = Counter(r.ids[-1] for r in three.generate(PROMPTS, SAMPLING, n=8) if r.finish_reason == "stop")
    assert set(ends) == stops
    for a, b in zip(
        one.generate(PROMPTS, SAMPLING, n=8), three.generate(PROMPTS, SAMPLING, n=8), strict=True
    ):
        first = next((i for i, token in enumerate(a.ids) if token in stops), len(a.ids) - 1)
        assert b.ids == a.ids[: first + 1]


def test_a_stop_at_the_last_token_is_a_stop(engine: HFEngine) -> None:
    stopped = next(r for r in engine.generate(PROMPTS, SAMPLING, n=6) if r.finish_reason == "stop")
    exact = replace(SAMPLING, max_new_tokens=len(stopped.ids))
    (again,) = [r for r in engine.generate([stopped.prompt], exact, n=6) if r.sample == stopped.sample]
    assert again.finish_reason == "stop"
    assert again.ids == stopped.ids


def test_one_token(engine: HFEngine) -> None:
    rollouts = engine.generate(PROMPTS, replace(SAMPLING, max_new_tokens=1))
    assert all(len(r.ids) == 1 for r in rollouts)
    assert all(
        r.logprobs == pytest.approx(reference_logps(engine.model, r.context, r.ids), abs=2e-5)
        for r in rollouts
    )


def test_nothing_asked_nothing_written(engine: HFEngine) -> None:
    assert engine.generate([], SAMPLING) == []
    assert engine.continue_from([], SAMPLING) == []
    assert engine.score([], []) == []


def test_ids_beyond_the_vocabulary_are_never_drawn(tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows of the head that pad it to a round number can have any weights."""
    model = make_model(0, tied=False)
    with torch.no_grad():
        model.lm_head.weight[40:] = 3 * model.lm_head.weight[:40][: len(model.lm_head.weight) - 40]
    whole, cut = make_engine(model, tokenizer), make_engine(model, tokenizer, vocabulary=40)
    assert any(token >= 40 for ids in plain(whole.generate(PROMPTS, SAMPLING)) for token in ids)
    for r in cut.generate(PROMPTS, SAMPLING):
        assert max(r.ids) < 40
        logp_TV = reference_logits(model, [*r.context, *r.ids])[:, :40].log_softmax(-1)
        expected = [float(logp_TV[len(r.context) - 1 + t, token]) for t, token in enumerate(r.ids)]
        assert r.logprobs == pytest.approx(expected, abs=2e-5)
        (scores,) = cut.score([r.context], [r.ids])
        assert scores == pytest.approx(expected, abs=2e-5)


# Going on.


def test_continuing_greedily_is_generating_on(any_engine: HFEngine) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=20)
    rollouts = any_engine.generate(PROMPTS, greedy)
    for cut in (1, 7):
        rest = any_engine.continue_from(
            [(*r.context, *r.ids[:cut]) for r in rollouts], replace(greedy, max_new_tokens=20 - cut)
        )
        for r, c in zip(rollouts, rest, strict=True):
            if len(r.ids) > cut:
                assert (*r.ids[:cut], *c.ids) == r.ids
                assert c.finish_reason == r.finish_reason


def test_continuing_from_a_context_is_generating(engine: HFEngine) -> None:
    rollouts = engine.generate(PROMPTS, SAMPLING)
    done = engine.continue_from(
        [r.context for r in rollouts], SAMPLING, keys=[f"{r.prompt.id}/0" for r in rollouts]
    )
    assert [c.ids for c in done] == plain(rollouts)
    assert [c.finish_reason for c in done] == [r.finish_reason for r in rollouts]


def test_continuations_have_the_models_logprobs(engine: HFEngine) -> None:
    prefixes = [(1, *range(5, 5 + n)) for n in (1, 9, 4, 9)]
    for prefix, c in zip(prefixes, engine.continue_from(prefixes, SAMPLING), strict=True):
        assert c.logprobs == pytest.approx(reference_logps(engine.model, prefix, c.ids), abs=2e-5)


@pytest.mark.parametrize("limit", [1, 20])
def test_greedy_is_transformers_greedy(any_engine: HFEngine, limit: int) -> None:
    rollouts = any_engine.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=limit))
    for r in rollouts:
        ids = torch.tensor([r.context])
        with torch.no_grad():
            out = unwrapped(any_engine.model).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=limit,
                eos_token_id=[2],
                pad_token_id=0,
            )
        assert r.ids == tuple(out[0, len(r.context) :].tolist())
        assert r.logprobs == (0.0,) * len(r.ids), "of the distribution drawn from: one entry"


def test_the_mode_of_the_model_is_given_back(engine: HFEngine) -> None:
    for training in (True, False):
        engine.model.train(training)
        engine.generate(PROMPTS[:1], SAMPLING)
        assert engine.model.training is training


def test_dropout_is_off_while_writing(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(0)
    engine = make_engine(model, tokenizer)
    expected = plain(engine.generate(PROMPTS, SAMPLING))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert plain(engine.generate(PROMPTS, SAMPLING)) == expected


def test_rollouts_carry_version_and_sampling(engine: HFEngine) -> None:
    assert engine.generate(PROMPTS[:1], SAMPLING)[0].policy_version == 0
    engine.sync_weights(17)
    (r,) = engine.generate(PROMPTS[:1], SAMPLING)
    assert r.policy_version == 17
    assert r.sampling == SAMPLING


def test_new_weights_write_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    """The engine has no copy: what trains is what writes."""
    model = make_model(0)
    engine = make_engine(model, tokenizer)
    before = plain(engine.generate(PROMPTS, SAMPLING))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    after = engine.generate(PROMPTS, SAMPLING)
    assert plain(after) != before
    assert after[0].logprobs == pytest.approx(
        reference_logps(model, after[0].context, after[0].ids), abs=2e-5
    )


def test_context_overflow_says_so(engine: HFEngine) -> None:
    with pytest.raises(UserError, match="11 tokens and 502 new ones do not fit the model's context of 512"):
        engine.continue_from([(1,) * 11], replace(SAMPLING, max_new_tokens=502))
    assert len(engine.continue_from([(1,) * 11], replace(SAMPLING, max_new_tokens=501))) == 1


# The distribution drawn from, computed another way.

TRUNCATIONS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7),
    Sampling(top_p=0.6),
    Sampling(top_k=3),
    Sampling(temperature=0.6, top_p=0.8, top_k=6),
]


def by_hand(logits: Sequence[float], sampling: Sampling) -> list[float]:
    """Plain Python: temper, keep the k likeliest, keep the smallest set that reaches p, renormalise."""
    tempered = [math.exp(x / sampling.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -tempered[i])
    kept = order[: sampling.top_k] if sampling.top_k else order
    total, reached, nucleus = sum(tempered[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        reached += tempered[i] / total
        if reached >= sampling.top_p:
            break
    mass = sum(tempered[i] for i in nucleus)
    return [tempered[i] / mass if i in nucleus else 0.0 for i in range(len(logits))]


LOGITS = [0.3, -1.2, 2.0, 0.9, -0.4, 1.4, -3.0, 0.0, 1.1, -0.1]


@pytest.mark.parametrize("sampling", TRUNCATIONS, ids=str)
def test_the_truncated_distribution(sampling: Sampling) -> None:
    expected = by_hand(LOGITS, sampling)
    logits_BV = torch.tensor([LOGITS])
    found = truncate(logits_BV / sampling.temperature, sampling).softmax(-1)[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert (sum(p > 0 for p in expected) < 10) == (sampling.top_k > 0 or sampling.top_p < 1)


@pytest.mark.parametrize("sampling", TRUNCATIONS, ids=str)
def test_frequencies(sampling: Sampling) -> None:
    """40,000 draws against the distribution by hand; a token outside it is never drawn."""
    expected, draws = by_hand(LOGITS, sampling), 40_000
    uniform_B = torch.from_numpy(noise(0, "frequencies", draws))
    tokens_B, logp_B = draw(torch.tensor([LOGITS]).expand(draws, -1), sampling, uniform_B)
    counts = torch.bincount(tokens_B, minlength=10).tolist()
    assert all(c == 0 for c, p in zip(counts, expected, strict=True) if p == 0)
    cells = [(c, draws * p) for c, p in zip(counts, expected, strict=True) if p > 0]
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    assert statistic < chi2.ppf(0.999, len(cells) - 1)
    assert logp_B.exp().tolist() == pytest.approx([expected[t] for t in tokens_B.tolist()], abs=1e-6)


@pytest.mark.parametrize("sampling", TRUNCATIONS[1:], ids=str)
def test_truncated_samples_carry_the_truncated_logprobs(engine: HFEngine, sampling: Sampling) -> None:
    sampling = replace(sampling, max_new_tokens=10)
    for r in engine.generate(PROMPTS, sampling):
        assert r.sampling == sampling
        assert not r.sampling.untruncated
        logits_TV = reference_logits(engine.model, [*r.context, *r.ids])
        for t, (token, logp) in enumerate(zip(r.ids, r.logprobs, strict=True)):
            expected = by_hand(logits_TV[len(r.context) - 1 + t].tolist(), sampling)
            assert math.exp(logp) == pytest.approx(expected[token], rel=1e-3)


def test_sampled_first_tokens_follow_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    """Frequencies through the whole engine: 3,000 samples of one prompt."""
    engine = make_engine(make_model(0), tokenizer, batch_tokens=10**6)
    rollouts = engine.generate(PROMPTS[:1], replace(SAMPLING, max_new_tokens=1), n=3000)
    p_V = reference_logits(engine.model, rollouts[0].context)[-1].softmax(-1)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in rollouts]), minlength=len(p_V))
    often = p_V * 3000 >= 5
    cells = [(float(c), 3000 * float(p)) for c, p in zip(counts[often], p_V[often], strict=True)]
    cells.append((float(counts[~often].sum()), 3000 * float(p_V[~often].sum())))
    assert sum((c - e) ** 2 / e for c, e in cells) < chi2.ppf(0.999, len(cells) - 1)


@pytest.mark.parametrize("point", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval(point: float) -> None:
    """The least and the greatest uniform draw tokens that have mass, whatever lies at the ends."""
    inf = float("inf")
    logits_BV = torch.tensor([[-inf, 0.0, -inf, 1.0, -inf], [-inf, -inf, 3.0, -inf, -inf]])
    tokens_B, logp_B = draw(logits_BV, Sampling(), torch.full((2,), point, dtype=torch.float64))
    assert tokens_B.tolist() == [1 if point == 0 else 3, 2]
    assert torch.isfinite(logp_B).all()


def test_a_fault_leaves_the_model_in_training_mode(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.model.train()

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(unwrapped(engine.model).get_decoder(), "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.continue_from([(1, 5)], SAMPLING)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.score([(1, 5)], [(4, 2)])
    assert engine.model.training
