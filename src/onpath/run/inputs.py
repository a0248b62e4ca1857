"""The prompts of a run, read and checked before a model trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onpath.config.sections import Data
from onpath.config.whole import EVALUATIONS, ROLLOUTS, Config
from onpath.data.load import LoadedPrompts, load_prompts, prompts_of_step
from onpath.data.render import Renderer
from onpath.engines.head import head_of
from onpath.engines.models import context_length
from onpath.engines.worlds import world_of
from onpath.evaluate.scores import check
from onpath.grade.code import refuses
from onpath.records import Prompt
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import place
from onpath.system.reading import read_text

CLOCK_FILE = "clock.txt"
"""In a run's directory, where its chat template prints the clock."""
_LONGEST_TEMPLATE = 2**20
Evals = Mapping[str, tuple[Prompt, ...]]
"""Split → problems, each with an answer."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a run trains on and is evaluated on."""

    pool: tuple[Prompt, ...]
    evals: Evals
    skipped: int = 0
    """Bad rows left out (data.skip_bad)."""
    skipped_evals: Mapping[str, int] = field(default_factory=dict)
    """Likewise, by evaluation set; those with none are not in it."""


def load_data(config: Config) -> Prompts:
    """The training pool and the evaluation sets.

    Raises:
        UserError: unreadable, too few, or without a column that the method needs.
    """
    data = config.data
    pool = load_pool(config)
    prompts_of_step(pool.prompts, size=config.rollout.prompts, seed=0, step=0)  # refuses a pool too small
    for column in config.method.needs:
        lacking = [p.named for p in pool.prompts if not (getattr(p, column) or "").strip()]
        if lacking:
            raise UserError(
                f"{data.train}: method.name {config.method.name} needs the column {column} for every "
                f"prompt, but {len(lacking)} of {len(pool.prompts)} have none, the first with id "
                f"{lacking[0]}"
            )
    evals = load_evals(config)
    return Prompts(
        pool=pool.prompts,
        evals={name: loaded.prompts for name, loaded in evals.items()},
        skipped=pool.skipped,
        skipped_evals={name: loaded.skipped for name, loaded in evals.items() if loaded.skipped},
    )


def by_source(data: Data, pool: Sequence[Prompt], evals: Evals) -> dict[str, list[Prompt]]:
    """All prompts, by where they come from."""
    found = {data.train: [*pool]}
    for name, source in data.eval.items():
        found.setdefault(source, []).extend(evals[name])
    return found


def trained_on(pool: Sequence[Prompt], evals: Evals) -> tuple[int, int]:
    """How many evaluation problems are training prompts too, and how many there are."""
    trained = {p.question.strip() for p in pool}
    problems = [p for prompts in evals.values() for p in prompts]
    return sum(p.question.strip() in trained for p in problems), len(problems)


def load_pool(config: Config) -> LoadedPrompts:
    """The training prompts; of several teachers each has one.

    Raises:
        UserError: unreadable, or a teacher has no prompt.
    """
    data = config.data
    pool = load_prompts(
        data.train,
        limit=data.limit,
        skip_bad=data.skip_bad,
        columns=data.train_columns,
        teachers=tuple(config.teachers),
        refuses=refuses(config.eval.grader),
        key="data.train",
    )
    check_taught(config, pool.prompts)
    return pool


def check_taught(config: Config, pool: Sequence[Prompt]) -> None:
    """Of several teachers each has a prompt.

    Raises:
        UserError: one has none.
    """
    used = {*config.method.asks_teachers, *(prompt.teacher for prompt in pool)}
    used |= {one for name, weights in config.mixtures.items() if name in used for one in weights}
    if idle := [name for name in config.teachers if name not in used]:
        raise UserError(
            f"teachers.{idle[0]}: none of the {len(pool)} rows of {config.data.train} names it in "
            f"{config.data.teacher_column!r} (data.teacher_column); take it out, or mend the column"
        )


def load_evals(config: Config) -> dict[str, LoadedPrompts]:
    """The evaluation sets.

    Raises:
        UserError: unreadable, or without answers.
    """
    data = config.data
    for name, source in data.eval.items():
        if world_of(source) is not None:
            raise UserError(
                f"data.eval.{name}: {source}: spoil and lost act on training rollouts and on their teacher, "
                "and on no evaluation; leave them out"
            )
    evals = {
        name: load_problems(
            data, source, limit=data.eval_limit, grader=config.eval.grader, key=f"data.eval.{name}"
        )
        for name, source in data.eval.items()
    }
    for name, loaded in evals.items():
        check(loaded.prompts, n=config.eval.n, k=config.eval.k, split=name)
    return evals


def load_problems(data: Data, source: str, *, limit: int | None, grader: str, key: str = "") -> LoadedPrompts:
    """What an evaluation asks; the columns of the training data are tried, and need not be there.

    Raises:
        UserError: unreadable, or the grader cannot use a row's tests.
    """
    return load_prompts(
        source,
        limit=limit,
        skip_bad=data.skip_bad,
        split_default="test",
        columns=data.columns,
        all_columns=False,
        refuses=refuses(grader),
        key=key,
    )


def make_renderer(config: Config, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """How the run's prompts are rendered.

    Raises:
        UserError: data.chat_template cannot be read, there is no template to use, or options are set that
            only a chat template reads.
    """
    thinking = config.data.enable_thinking
    with_template(config, tokenizer)
    moment = distributed.gather([_moment(config).isoformat()])[0]  # ranks start at different ones
    renderer = Renderer(
        tokenizer,
        template=config.data.template,
        system=config.data.system,
        template_options=None if thinking is None else {"enable_thinking": thinking},
        clock=datetime.fromisoformat(moment),
    )
    if config.data.template == "auto" and not renderer.chat and config.data.of_chat:
        raise UserError(
            f"data.{config.data.of_chat[0]} is for chat prompts, and {config.student.model} has no chat "
            "template; put it into the prompts, or name a template as data.chat_template"
        )
    return renderer


def with_template(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer the chat template of the config, if that names one.

    Raises:
        UserError: it cannot be read.
    """
    if config.data.chat_template is not None:
        path = place(config.data.chat_template, key="data.chat_template")
        try:
            tokenizer.chat_template = read_text(path, most=_LONGEST_TEMPLATE)
        except UserError as error:
            raise UserError(f"data.chat_template: {error}") from None


def _moment(config: Config) -> datetime:
    """When the run first started, as far as its prompts know: a template may print the clock."""
    path = Path(config.run.dir) / config.run.name / CLOCK_FILE
    try:
        return datetime.fromisoformat(path.read_text().strip())
    except (FileNotFoundError, NotADirectoryError):  # whatever is wrong there, opening the run will say
        return datetime.now().replace(microsecond=0)
    except (OSError, ValueError):
        raise UserError(
            f"{path} is not a moment such as 2026-01-31T12:00:00; mend it, or remove it"
        ) from None


def fitting(
    config: Config,
    renderer: Renderer,
    student: PreTrainedModel,
    prompts: Prompts,
) -> tuple[Prompts, dict[str, int]]:
    """Every prompt and its response must fit the model before the first step, not at the thousandth.

    Returns:
        The prompts, with data.skip_bad but for training prompts that do not fit (evaluations stay what they
        are); and the most tokens of one, by the option that says how much is generated after it.

    Raises:
        UserError: one does not fit, or too few do; or one cannot be rendered, or not twice alike.
    """
    if renderer.ids(prompts.pool[0]) != renderer.ids(prompts.pool[0]):
        raise UserError("the chat template renders the same prompt differently each time; take its dice out")
    data, fits, rows = config.data, context_length(student.config), head_of(student).vocabulary

    def sized(some: Sequence[Prompt], new: int, lower: str, *, trained: bool) -> list[int]:
        sizes = [_tokens(renderer, prompt, rows) for prompt in some]
        long = [i for i, size in enumerate(sizes) if size + new > fits]
        if long and not (trained and data.skip_bad and len(long) < len(sizes)):
            leaves_out = ["drop them", *(["data.skip_bad: true"] if trained and not data.skip_bad else [])]
            remedies = leaves_out if len(long) < len(sizes) else []  # else none would be left
            remedies += [f"lower {lower}"] if sizes[long[0]] < fits else []
            raise UserError(
                f"prompt {some[long[0]].named} has {sizes[long[0]]} tokens; with {new} new ones it "
                f"does not fit the student's context of {fits}, as {len(long)} of {len(sizes)} do not: "
                + (", or ".join(remedies) or "take shorter ones")
            )
        return sizes

    new, lower = config.longest_generated
    sizes = sized(prompts.pool, new, lower, trained=True)
    pool = tuple(p for p, size in zip(prompts.pool, sizes, strict=True) if size + new <= fits)
    if len(pool) < len(prompts.pool):
        prompts_of_step(pool, size=config.rollout.prompts, seed=0, step=0)  # enough are left
        check_taught(config, pool)
    most = {ROLLOUTS: max(size for size in sizes if size + new <= fits)}
    for problems in prompts.evals.values():
        sizes = sized(problems, config.generated[EVALUATIONS], EVALUATIONS, trained=False)
        most[EVALUATIONS] = max(*sizes, most.get(EVALUATIONS, 0))
    _check_room(config, most)
    skipped = prompts.skipped + len(prompts.pool) - len(pool)
    return replace(prompts, pool=pool, skipped=skipped), most


def _check_room(config: Config, longest: Mapping[str, int]) -> None:
    """A vLLM in this process that has less room than the student ends responses early."""
    section = config.rollout
    room = section.vllm.get("max_model_len") if section.engine == "vllm" and section.url is None else None
    if (found := config.too_long(longest, room if isinstance(room, int) else None)) is not None:
        option, prompt, new = found
        raise UserError(
            f"rollout.vllm: max_model_len is {room}, but a prompt has {prompt} tokens and {option} is "
            f"{new}; set it to at least {prompt + new}, or lower {option}"
        )


def _tokens(renderer: Renderer, prompt: Prompt, rows: int) -> int:
    """Of a prompt that can be rendered, in ids that the student knows."""
    renderer.check(prompt)
    ids = renderer.ids(prompt)
    if max(ids) >= rows:
        raise UserError(
            f"prompt {prompt.named} holds id {max(ids)} ({renderer.tokens([max(ids)])[0]!r}), but "
            f"student.model knows {rows} ids only: its tokenizer is another model's, or its embeddings "
            "were not resized"
        )
    return len(ids)
