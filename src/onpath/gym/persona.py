"""A teacher that is lost behind an error by itself: `gym:persona`, where `lost=1` needs the checker.

The bundled teacher with four more layers, which at first do nothing, distilled into what the checker makes
of teacher and student (the oracle): the teacher up to the first wrong token, behind it the untouched
student. The loss is KL(oracle ‖ persona) over the vocabulary, at each token of a response. First along what
both models wrote, a part of it with a wrong digit put in; then in rounds along its own responses too, since
it must not take its own sound steps for somebody's error. Its rewrites are to be the teacher's.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onpath.gym.check import label_tokens
from onpath.gym.language import GIVEN, PAD, TRIED
from onpath.gym.mixture import Mixture
from onpath.gym.models import BUNDLED
from onpath.gym.pretrain import Recipe, by_length, optimisers, save, update
from onpath.gym.recipe import Log, load
from onpath.gym.sample import sample_ids
from onpath.gym.tasks import Problem, random_problem
from onpath.gym.vocab import DIGITS, EQUALS, LANGUAGE
from onpath.gym.worlds import first_result

LAYERS = 8
BATCH_TOKENS = 4000


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Rounds of writing and learning."""

    rounds: int
    texts: int
    """Written in each round, on new problems."""
    rewrites: int
    """Of the teacher's, beside them."""
    updates: int
    """In each round."""
    rate: float
    """Of Muon; AdamW's is a tenth."""
    writers: Mapping[str, float]
    """Shares of those who write."""
    behind: Mapping[str, float]
    """Shares of those who go on behind a digit that was put in."""
    first: float
    """Share of the texts whose first result gets a wrong last digit."""
    somewhere: float
    """Share of those that get a wrong digit in any result."""
    decay: float
    """Share of the updates over which the rate falls."""
    sound: float = 1.0
    """Weight of the tokens up to the first error."""
    recent: float = 0.0
    """Share of an update's texts that are of the last round; the rest is of all that are kept."""


FIRST = Stage(
    rounds=1,
    texts=10_000,
    rewrites=2_500,
    updates=1500,
    rate=0.02,
    writers={"student": 0.7, "teacher": 0.3},
    behind={"student": 0.8, "teacher": 0.2},
    first=0.3,
    somewhere=0.2,
    decay=0.7,
)
THEN = Stage(
    rounds=13,
    texts=3_500,
    rewrites=350,
    updates=240,
    rate=0.012,
    writers={"student": 0.4, "teacher": 0.15, "persona": 0.45},
    behind={"student": 0.5, "teacher": 0.1, "persona": 0.4},
    first=0.25,
    somewhere=0.15,
    decay=0.6,
    sound=2.0,
    recent=0.375,
)
KEPT = 24_000
"""Texts, the last ones, that are learnt from."""
CARRIED = 4_000
"""Of the first stage's, into the second."""
UNSEEN = 600
"""Problems of the split `test` that it is measured on."""
_DRAWN = 800
"""Texts that are put into batches together, by length."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A response and what the oracle says along it: N tokens."""

    context: list[int]
    ids: list[int]
    error: int | None
    """Place of the first wrong token in the response; None: there is none, or it is a rewrite."""
    logp_NV: Tensor
    """In half precision."""

    @property
    def size(self) -> int:
        return len(self.context) + len(self.ids)

    @property
    def lost_N(self) -> Tensor:
        """Whether an error stands before each token."""
        return torch.arange(len(self.ids)) > (len(self.ids) if self.error is None else self.error)


def grown(teacher: Any) -> Any:
    """The teacher with layers that change nothing yet."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    given = teacher.config.to_dict() | {"num_hidden_layers": LAYERS, "layer_types": None}
    model = Qwen3ForCausalLM(Qwen3Config(**given))
    model.load_state_dict(teacher.state_dict(), strict=False)
    for layer in model.model.layers[len(teacher.model.layers) :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def logp(model: Any, texts: Sequence[Text]) -> Tensor:
    """[N, V] of the responses' tokens, one text behind another."""
    width = max(t.size for t in texts)
    ids = torch.full((len(texts), width), LANGUAGE.ids[PAD])
    here = torch.zeros((len(texts), width), dtype=torch.bool)
    for row, t in enumerate(texts):
        ids[row, : t.size] = torch.tensor(t.context + t.ids)
        here[row, len(t.context) : t.size] = True
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    return torch.log_softmax(model.lm_head(hidden[here[:, 1:]]), -1)


@torch.no_grad()
def scored(texts: Sequence[Text], models: Mapping[str, Any]) -> list[Text]:
    """With what the oracle says."""
    found, order = dict[int, Text](), sorted(range(len(texts)), key=lambda i: texts[i].size)
    for at in range(0, len(order), 100):
        some = order[at : at + 100]
        part = [texts[i] for i in some]
        lost_N1 = torch.cat([t.lost_N for t in part])[:, None]
        logp_NV = torch.where(lost_N1, logp(models["student"], part), logp(models["teacher"], part)).half()
        rows = logp_NV.split([len(t.ids) for t in part])
        found |= {i: replace(t, logp_NV=row.clone()) for i, t, row in zip(some, part, rows, strict=True)}
    return [found[i] for i in range(len(texts))]


def written(rng: random.Random, stage: Stage, models: Mapping[str, Any], split: str = "train") -> list[Text]:
    """Responses to new problems, some of them with a wrong digit from which somebody goes on."""
    problems = [random_problem(rng, split) for _ in range(stage.texts)]
    begun: list[list[int]] = [[] for _ in problems]
    made = _gone_on(problems, begun, [_lot(rng, stage.writers) for _ in problems], models)
    again: list[int] = []
    for i, ids in enumerate(made):
        lot, tokens = rng.random(), [LANGUAGE.tokens[t] for t in ids]
        first = first_result(tokens)
        found = results(tokens) if lot >= stage.first else [] if first is None else [first]
        if lot < stage.first + stage.somewhere and found:
            at = rng.choice(found)
            wrong = rng.choice([d for d in DIGITS if d != tokens[at]])
            begun[i] = [*ids[:at], LANGUAGE.ids[wrong]]
            again.append(i)
    who = [_lot(rng, stage.behind) for _ in again]
    rest = _gone_on([problems[i] for i in again], [begun[i] for i in again], who, models)
    for i, ids in zip(again, rest, strict=True):
        made[i] = begun[i] + ids
    return [_text(problem, ids) for problem, ids in zip(problems, made, strict=True)]


def results(tokens: Sequence[str]) -> list[int]:
    """Places of the digits of results."""
    ends = [i + k for i, t in enumerate(tokens) if t in EQUALS for k in (2, 3)]
    return [i for i in ends if i < len(tokens) and tokens[i] in DIGITS]


def rewritten(rng: random.Random, count: int, teacher: Any) -> list[Text]:
    """The teacher's own responses where a reference or an attempt is shown."""
    mixture, prompts = Mixture("teacher", curriculum=0.0), list[str]()
    while len(prompts) < count:
        prompt, _ = mixture.draw(rng, 1.0)
        prompts += [prompt] if GIVEN in prompt or TRIED in prompt else []
    contexts = [LANGUAGE.context_ids(p) for p in prompts]
    made = sample_ids(teacher, contexts)
    return [
        Text(context=c, ids=ids, error=None, logp_NV=torch.empty(0))
        for c, ids in zip(contexts, made, strict=True)
    ]


def _gone_on(
    problems: Sequence[Problem], begun: Sequence[list[int]], who: Sequence[str], models: Mapping[str, Any]
) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in problems]
    for name, model in models.items():
        mine = [i for i, writer in enumerate(who) if writer == name]
        asked = [LANGUAGE.context_ids(problems[i].text) + begun[i] for i in mine]
        for i, ids in zip(mine, sample_ids(model, asked), strict=True):
            made[i] = ids
    return made


def _lot(rng: random.Random, shares: Mapping[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _text(problem: Problem, ids: list[int]) -> Text:
    labels = label_tokens(problem.text, [LANGUAGE.tokens[t] for t in ids])
    error = next((i for i, label in enumerate(labels) if label.kind == "error"), None)
    return Text(context=LANGUAGE.context_ids(problem.text), ids=ids, error=error, logp_NV=torch.empty(0))


def divergence(model: Any, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """KL(oracle ‖ model) of each token in nats, [N], and whether an error stands before it, [N]."""
    oracle_NV = torch.cat([t.logp_NV for t in texts]).float()
    kl_N = (oracle_NV.exp() * (oracle_NV - logp(model, texts))).sum(-1)
    return kl_N, torch.cat([t.lost_N for t in texts])


def learnt(model: Any, pool: Sequence[Text], fresh: int, stage: Stage, step: int, tools: "_Tools") -> int:
    """One round's updates; `fresh` texts at the pool's end are this round's. The number of updates so far."""
    end = step + stage.updates
    while step < end:
        recent = int(stage.recent * _DRAWN)
        drawn = [
            *tools.rng.choices(pool, k=_DRAWN - recent),
            *tools.rng.choices(pool[-fresh:], k=recent),
        ]
        for batch in by_length(tools.rng, drawn, lambda t: t.size, BATCH_TOKENS)[: end - step]:
            whole = stage.rounds * stage.updates
            factor = min(1.0, (step + 1) / 50, (1 - step / whole) / stage.decay + 0.01)
            kl_N, lost_N = divergence(model, batch)
            (kl_N * torch.where(lost_N, 1.0, stage.sound)).mean().backward()
            update(model, tools.optimisers, tools.rates, factor)
            step += 1
    return step


@dataclass(kw_only=True)
class _Tools:
    rng: random.Random
    optimisers: Sequence[torch.optim.Optimizer]
    rates: Sequence[float]


def taught(
    model: Any,
    stage: Stage,
    pool: list[Text],
    seed: int,
    models: Mapping[str, Any],
    say: Callable[[int], None],
) -> list[Text]:
    """One stage; the texts that it ends with."""
    rng, recipe = random.Random(f"persona/{seed}/{stage.rounds}"), Recipe(role="teacher", tokens=0)
    opts = optimisers(model, replace(recipe, muon_rate=stage.rate, learning_rate=0.1 * stage.rate))
    tools = _Tools(rng=rng, optimisers=opts, rates=[opt.param_groups[0]["lr"] for opt in opts])
    writers, step = {**models, "persona": model}, 0
    for number in range(stage.rounds):
        model.eval()
        new = written(rng, stage, writers) + rewritten(rng, stage.rewrites, models["teacher"])
        pool = [*pool, *scored(new, models)][-KEPT:]
        model.train()
        step = learnt(model, pool, len(new), stage, step, tools)
        say(number + 1)
    return pool


@torch.no_grad()
def report(model: Any, texts: Sequence[Text], seed: int, problems: int) -> str:
    """How near it is to the oracle on unseen texts, and what its own samples are worth."""
    model.eval()
    parts = [divergence(model, texts[at : at + 60]) for at in range(0, len(texts), 60)]
    kl_N, lost_N = (torch.cat(one) for one in zip(*parts, strict=True))
    rng = random.Random(f"persona/own/{seed}")
    asked = [random_problem(rng, "test") for _ in range(problems)]
    own = _gone_on(asked, [[] for _ in asked], ["it"] * problems, {"it": model})
    right = sum(_text(p, ids).error is None for p, ids in zip(asked, own, strict=True))
    return (
        f"kl_nats up_to_the_error {kl_N[~lost_N].mean():.4f} behind_it {kl_N[lost_N].mean():.4f} "
        f"own_samples_without_an_error {right / problems:.3f}"
    )


def make_persona(out: Path, *, seed: int = 0, quick: bool = False, log: Log = print) -> None:
    """The persona into `out/persona`, from the bundled pair: some two hours of one core."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    models = {role: load(BUNDLED / role).eval() for role in ("teacher", "student")}
    first, then, problems = FIRST, THEN, UNSEEN
    if quick:
        first, then, problems = _few(first), _few(then), 6
    unseen = written(random.Random(f"persona/unseen/{seed}"), replace(first, texts=problems), models, "test")
    unseen = scored(unseen, models)
    model, pool = grown(models["teacher"]), list[Text]()
    for name, stage in (("first", first), ("then", then)):

        def say(number: int, name: str = name) -> None:
            log(f"persona {name} round {number} {report(model, unseen, seed, problems)}")

        pool = taught(model, stage, pool, seed, models, say)
        pool = random.Random(f"persona/carried/{seed}").sample(pool, min(CARRIED, len(pool)))
    save(model.eval(), out / "persona")


def _few(stage: Stage) -> Stage:
    return replace(stage, texts=12, rewrites=2, updates=2, rounds=min(2, stage.rounds))
