"""From a config to the parts of a run. Cheap checks come first: nothing large loads before the data is known
to be good."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onpath import distributed
from onpath.ahead import Ahead, make_ahead
from onpath.allocator import keep_freed_memory
from onpath.cache import Cache
from onpath.config import Config
from onpath.cosine import GradientCosine
from onpath.data import LoadedPrompts, load_prompts, prompts_of_step
from onpath.engines.base import Engine
from onpath.engines.hf import HFEngine
from onpath.errors import UserError
from onpath.evaluate import check
from onpath.grade import Grader, grader_for
from onpath.losses import Head, Objective
from onpath.measure import Measure
from onpath.methods import Method, Tools, make_method
from onpath.methods.opsd import OPSD
from onpath.models import (
    check_head,
    check_vocabulary,
    context_length,
    head_of,
    load_model,
    load_tokenizer,
    locate,
    pick_device,
    quietly,
    stop_ids,
    unwrapped,
)
from onpath.options import OPSDOptions, TRDOptions
from onpath.prompts import EPISTEMIC_WORDS, TEMPLATES
from onpath.records import Prompt, Sampling
from onpath.render import Renderer
from onpath.teacher import Teacher
from onpath.writers import check_teacher, make_teacher, make_writer, offline_cache, room_of, student_engine


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that the steps of a run work with."""

    config: Config
    pool: tuple[Prompt, ...]
    evals: dict[str, tuple[Prompt, ...]]
    skipped: int
    """Bad rows left out (data.skip_bad)."""
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    student: nn.Module
    teacher: Teacher
    engine: Engine
    """Writes with the student's weights: rollouts and evaluations."""
    engine_over: Callable[[nn.Module], HFEngine]
    """An engine in this process over a model of the student's kind."""
    sampler: Engine
    """Writes the rollouts that are trained on: the engine, or what the starting weights wrote (offline)."""
    method: Method
    grader: Grader
    objective: Objective
    sampling: Sampling
    vocabulary: int
    device: torch.device
    tools: Tools
    """What the method works with."""
    cosine: GradientCosine
    cache: Cache | None = None
    """What the starting weights wrote, of an offline method."""
    ahead: Ahead | None = None
    """Draws the next batch while this one trains (rollout.overlap)."""
    warnings: tuple[str, ...] = field(default=())

    @property
    def head(self) -> Head:
        """The student's output layer."""
        return head_of(self.student, self.vocabulary)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 forward passes if optim.bf16 asks for them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.bf16)


def assemble(config: Config) -> Parts:
    """Loads and checks everything that a run needs.

    Raises:
        UserError: in one sentence, whatever the user can fix.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    objective = config.method.objective()
    loaded, evals = load_data(config)
    tokenizer = load_tokenizer(config.student, "student.model")
    device = distributed.local_device(pick_device(config.student.device, "student.device"))
    distributed.start(device)
    if device.type == "cpu":
        keep_freed_memory()
    renderer = make_renderer(config, tokenizer)
    base = load_model(config.student, "student.model", device)
    stops = stop_ids(base, tokenizer)
    check_head(base, "student.model")
    longest = check_prompts(config, renderer, base, loaded.prompts, evals)
    student = trainable(config, base)
    vocabulary, warnings = shared_vocabulary(config, tokenizer)
    vocabulary = min(vocabulary, head_of(student).vocabulary)
    teacher = make_teacher(config, student, renderer, vocabulary, stops, device)
    check_teacher(config, teacher, longest)
    grader = grader_for(config.eval.grader, [config.data.train, *config.data.eval.values()])
    sampling = Sampling(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed,
    )

    def engine_over(model: nn.Module) -> HFEngine:
        return HFEngine(
            model,
            renderer,
            stop_ids=stops,
            batch_tokens=config.rollout.batch_tokens,
            bf16=config.optim.bf16,
            vocabulary=vocabulary,
        )

    engine = student_engine(config, student, engine_over(student))
    writer = make_writer(config, teacher, renderer, stops, engine_over)
    cache, sampler, writer = offline_cache(config, engine, writer, student, renderer)
    ahead = make_ahead(config, student, engine, engine_over)
    measure = Measure(
        student=student,
        teacher=teacher,
        vocabulary=vocabulary,
        device=device,
        max_tokens=config.optim.micro_batch_tokens,
        bf16=config.optim.bf16,
    )
    tools = Tools(
        student=engine,
        writer=writer,
        teacher=teacher,
        renderer=renderer,
        grader=grader,
        sampling=sampling,
        templates=templates_for(config),
        vocabulary=vocabulary,
        measure=measure,
        room=room_of(teacher, student),
        first_error=checker_of(config),
        onset_ids=onset_ids(config, tokenizer),
    )
    method = make_method(config.method, tools)
    if isinstance(method, OPSD):
        method.check(loaded.prompts)
    return Parts(
        config=config,
        pool=loaded.prompts,
        evals=evals,
        skipped=loaded.skipped,
        tokenizer=tokenizer,
        renderer=renderer,
        student=student,
        teacher=teacher,
        engine=engine,
        engine_over=engine_over,
        sampler=ahead.engine if ahead else sampler,
        method=method,
        grader=grader,
        objective=objective,
        sampling=sampling,
        vocabulary=vocabulary,
        device=device,
        tools=tools,
        cosine=GradientCosine(student, every=config.method.cosine_every),
        cache=cache,
        ahead=ahead,
        warnings=tuple(warnings),
    )


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


def trainable(config: Config, base: nn.Module) -> nn.Module:
    """The student with gradients on: on all weights, or on a new LoRA adapter."""
    section = config.student
    if section.gradient_checkpointing:
        with quietly():
            unwrapped(base).gradient_checkpointing_enable({"use_reentrant": False})
    if section.lora_rank == 0:
        return base.requires_grad_(True)
    torch.manual_seed(config.run.seed)
    lora = LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,  # type: ignore[arg-type]  # peft divides, and takes floats
        target_modules=section.lora_targets,
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )
    try:
        with quietly():
            model: nn.Module = get_peft_model(base, lora)
    except ValueError as error:
        raise UserError(f"student.lora_targets: {str(error).splitlines()[0]}") from None
    if section.gradient_checkpointing:
        unwrapped(model).enable_input_require_grads()
    return model


def shared_vocabulary(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """Number of ids that student and teacher share, and what looks odd about the pair."""
    ids = tokenizer.get_vocab()
    if config.method.self_taught:
        return max(ids.values()) + 1, []
    if config.teacher.engine == "chat":
        warning = (
            f"teacher.engine chat: {config.teacher.model} gives text and no log-probs, so the student learns "
            "by cross-entropy along what it writes, and no divergence is measured"
        )
        return max(ids.values()) + 1, [warning]
    check_vocabulary(ids, load_tokenizer(config.teacher, "teacher.model").get_vocab())
    same = Path(locate(config.student.model)).resolve() == Path(locate(config.teacher.model)).resolve()
    warning = (
        f"teacher.model is the student's own directory ({config.student.model}): "
        "the loss starts at 0 and teaches nothing"
    )
    return max(ids.values()) + 1, [warning] if same else []


def templates_for(config: Config) -> dict[str, str]:
    """Privileged prompts: the gym's own language for gym data, else our wording."""
    if not config.data.train.startswith("gym:"):
        return TEMPLATES
    from onpath import gym

    return {**TEMPLATES, **gym.TEMPLATES}


def checker_of(config: Config) -> Callable[[str, str], int | None] | None:
    """The task's checker of steps, where it has one."""
    if not config.data.train.startswith("gym:"):
        return None
    from onpath import gym

    return gym.first_error


def onset_ids(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """First tokens of the words that open a correction, with and without a space before them."""
    asked = config.method.epistemic if isinstance(config.method, OPSDOptions | TRDOptions) else None
    words = EPISTEMIC_WORDS if asked is None else asked
    if asked is None and config.data.train.startswith("gym:"):
        from onpath import gym

        words = gym.ONSET_WORDS
    spellings = [spelling for word in words for spelling in (word, f" {word}") if spelling.strip()]
    first = {tokenizer(s, add_special_tokens=False)["input_ids"][0] for s in spellings}
    return tuple(sorted(first - {tokenizer.unk_token_id}))


def make_optimizer(parts: Parts) -> tuple[torch.optim.AdamW, Callable[[int], None]]:
    """AdamW, and the function that sets the learning rate of a step."""
    config = parts.config.optim
    trained = [p for p in parts.student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps
    )

    def schedule(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate(step, parts.config)

    return optimizer, schedule


def rate(step: int, config: Config) -> float:
    """Learning rate of step `step` (from 0) as a share of the peak: linear warm-up, then the schedule."""
    optim = config.optim
    warm = math.ceil(optim.warmup * optim.steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, optim.steps - warm)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
        optim.schedule
    ]
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape
