"""The prompts of a run, read and checked before a model trains."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onpath.config.build import Config
from onpath.config.methods.trd import TRDOptions
from onpath.data.load import LoadedPrompts, load_prompts, prompts_of_step
from onpath.data.render import Renderer
from onpath.engines.head import head_of
from onpath.engines.models import context_length
from onpath.evaluate.scores import check
from onpath.records import Prompt
from onpath.system.errors import UserError


def load_data(config: Config) -> tuple[LoadedPrompts, dict[str, tuple[Prompt, ...]]]:
    """The training pool and the evaluation sets."""
    data = config.data
    pool = load_prompts(data.train, limit=data.limit, skip_bad=data.skip_bad)
    prompts_of_step(pool.prompts, size=config.rollout.prompts, seed=0, step=0)  # refuses a pool too small
    for column in config.method.needs:
        lacking = [p.id for p in pool.prompts if not (getattr(p, column) or "").strip()]
        if lacking:
            raise UserError(
                f"{data.train}: method.name {config.method.name} needs the column {column} for every "
                f"prompt, but {len(lacking)} of {len(pool.prompts)} have none, the first with id "
                f"{lacking[0]!r}"
            )
    return pool, load_evals(config)


def load_evals(config: Config) -> dict[str, tuple[Prompt, ...]]:
    """The evaluation sets.

    Raises:
        UserError: unreadable, or without answers.
    """
    data = config.data
    evals = {
        name: load_prompts(
            source, limit=data.eval_limit, skip_bad=data.skip_bad, split_default="test"
        ).prompts
        for name, source in data.eval.items()
    }
    for name, prompts in evals.items():
        check(prompts, n=config.eval.n, k=config.eval.k, split=name)
    return evals


def make_renderer(config: Config, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    thinking = config.data.enable_thinking
    return Renderer(
        tokenizer,
        template=config.data.template,
        system=config.data.system,
        template_options=None if thinking is None else {"enable_thinking": thinking},
    )


def check_prompts(
    config: Config,
    renderer: Renderer,
    student: PreTrainedModel,
    pool: Sequence[Prompt],
    evals: Mapping[str, Sequence[Prompt]],
) -> int:
    """Every prompt and its response must fit the model before the first step, not at the thousandth.

    Returns:
        The most tokens of a prompt.
    """
    new, lower = config.rollout.max_new_tokens, "rollout.max_new_tokens"
    if isinstance(config.method, TRDOptions) and (config.method.rewrite_max_new_tokens or 0) > new:
        new, lower = config.method.rewrite_max_new_tokens or 0, "method.rewrite_max_new_tokens"
    asked = [(prompt, new, lower, config.data.train) for prompt in pool]
    for split, prompts in evals.items():
        source = config.data.eval[split]
        asked += [(p, config.eval.max_new_tokens, "eval.max_new_tokens", source) for p in prompts]
    room, rows, longest = context_length(student), head_of(student).vocabulary, 0
    for prompt, new, lower, source in asked:
        ids = renderer.ids(prompt)
        longest = max(longest, len(ids))
        if len(ids) + new > room:
            remedy = "drop it" if len(ids) >= room else f"drop it, or lower {lower}"
            raise UserError(
                f"{source}: prompt {prompt.id!r} has {len(ids)} tokens; with {new} new ones it does not fit "
                f"the student's context of {room}: {remedy}"
            )
        if max(ids) >= rows:
            raise UserError(
                f"prompt {prompt.id!r} holds id {max(ids)} ({renderer.tokens([max(ids)])[0]!r}), but "
                f"student.model knows {rows} ids only: its tokenizer is another model's, or its embeddings "
                "were not resized"
            )
    return longest
