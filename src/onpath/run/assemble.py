"""From a config to the parts of a run. Cheap checks come first: nothing large loads before the data is known
to be good."""

import copy
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from onpath.config.idle import idle_options
from onpath.config.sections import teacher_option
from onpath.config.whole import ROLLOUTS, Config
from onpath.data.load import some_of
from onpath.data.render import Renderer
from onpath.data.tasks import World, correction_ids, task_of, templates_of
from onpath.engines import late, sharding
from onpath.engines.base import Engine, Generators
from onpath.engines.forward import Models
from onpath.engines.head import check_head, head_of
from onpath.engines.hf import HFEngine
from onpath.engines.make import (
    check_teacher,
    make_replay,
    make_teacher,
    student_engine,
    teacher_engine,
    with_cache,
)
from onpath.engines.models import pick_device
from onpath.engines.overlap import frozen_copy, make_overlap
from onpath.engines.own import OwnEngine, check_engine
from onpath.engines.self_check import Agreement, check_model
from onpath.engines.stops import Stops, stops_of
from onpath.engines.student import (
    dropout_warning,
    precision_warning,
    sampling_warning,
    scale_warning,
    shared_vocabulary,
    trainable,
)
from onpath.engines.teacher import ModelTeacher, Teacher
from onpath.engines.worlds import (
    LostEngine,
    LostTeacher,
    RepeatingEngine,
    SpoilingEngine,
    lost_behind,
    world_of,
)
from onpath.grade.graders import grader_for
from onpath.grade.rewards import Reward
from onpath.methods import make_method
from onpath.methods.tools import Text, Tools
from onpath.run.alike import check_given
from onpath.run.gradient_cosine import GradientCosine
from onpath.run.guidance_ratio import GuidanceRatio
from onpath.run.inputs import (
    CLOCK_FILE,
    Prompts,
    by_source,
    fitting,
    load_data,
    make_renderer,
    trained_on,
)
from onpath.run.parts import Parts
from onpath.run.refresh import Refreshed
from onpath.run.trained import Trained, find, load_its_tokenizer, load_start
from onpath.system import allocator, code, distributed


def assemble(config: Config, *, engine: Engine | None = None) -> Parts:
    """Loads and checks everything that a run needs.

    Args:
        engine: generates the rollouts and evaluations in place of the one that the config names; it is told
            the run's renderer and stops.

    Raises:
        UserError: in one sentence, whatever the user can fix.
    """
    code.not_while_loading("onpath.train")
    if engine is not None:
        check_engine(engine)
    objective = config.method.objective()
    device = join(config)  # first: one's mistake is said by all then
    prompts = load_data(config)
    start = find(config.student.model)
    check_given(config, prompts, start)
    tokenizer = load_its_tokenizer(config.student, start, "student.model")
    shards = sharding.asked(config)
    host = torch.device("cpu") if shards else device  # a whole copy must not pass through each GPU
    if device.type == "cpu":
        allocator.keep_freed_memory()
    renderer = make_renderer(config, tokenizer)
    base = load_start(config.student, start, "student.model", host, shards=shards)
    check_head(base, "student.model")
    prompts, longest = fitting(config, renderer, base, prompts)
    world = world_of(config.data.train)
    untouched = late.whole(copy.deepcopy(base)) if world is not None and world.loses else None
    student = trainable(config, base)
    vocabulary, warnings = shared_vocabulary(config, tokenizer)
    vocabulary = min(vocabulary, head_of(student).vocabulary)
    stops = stops_of(config, base, tokenizer, vocabulary)
    if config.method.ends == "one":
        objective = replace(objective, ends=tuple(sorted(i for i in stops.ids if i < vocabulary)))
    warnings += warnings_of(config, prompts, student, renderer, stops, start)
    if stops.ids != stops.student:
        base.generation_config.eos_token_id = sorted(stops.ids)  # so that the saved model ends alike
    teacher = make_teacher(config, student, renderer, vocabulary, stops, host)
    after = lost_behind(world, config.run.seed, renderer)
    if untouched is not None:
        teacher = LostTeacher(teacher, ModelTeacher(untouched, vocabulary=vocabulary), after)
    check_teacher(config, teacher, longest[ROLLOUTS])
    frozen = frozen_copy(config, student, engine)
    if shards:  # after every copy: a sharded model has none
        sharding.place(config, device, student=student, teachers=teacher.models, frozen=frozen)
    models = models_of(config, student, with_cache(config, teacher), vocabulary, device, objective.ends)
    own = own_engine(config, student, renderer, stops, vocabulary)
    writer = teacher_engine(config, teacher, own, make_replay(config))
    generators = Generators(
        student=student_engine(config, student, own, longest=longest)
        if engine is None
        else OwnEngine(engine, renderer, stops, vocabulary=vocabulary),
        teacher=writer if untouched is None else LostEngine(writer, own.over(untouched), after),
        over=own.over,
    )
    with ExitStack() as started:  # what runs by now ends where the rest fails
        started.callback(generators.student.close)
        agreements = check_models(config, models, own, generates=generators.student is own)
        overlap = make_overlap(config, student, frozen, generators.student, own)
        sampler = generators.student if overlap is None else overlap.engine
        sampler, writes = in_world(config, world, sampler, generators, models.student_context_length)
        text = make_text(config, renderer, prompts)
        sampling = config.rollout.sampling(seed=config.run.seed)
        tools = Tools(models=models, generators=writes, text=text, sampling=sampling)
        method = make_method(config.method, tools)
        method.check(prompts.pool)
        refreshed = Refreshed.asked(
            config,
            prompts.pool,
            sampler=sampler,
            student=generators.student,
            sampling=sampling,
            method=method,
        )
        started.pop_all()
        return Parts(
            config=config,
            prompts=prompts,
            models=models,
            generators=generators,
            text=text,
            sampling=sampling,
            sampler=sampler,
            method=method,
            objective=objective,
            gradient_cosine=GradientCosine(student, every=config.method.cosine_every),
            guidance_ratio=GuidanceRatio(student, every=config.method.measures_ratio_every),
            refreshed=refreshed,
            overlap=overlap,
            stops=stops,
            warnings=tuple(warnings),
            agreements=agreements,
        )


def join(config: Config) -> torch.device:
    """This process takes its threads and its device, and meets the others."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = distributed.local_device(pick_device(config.student.device, "student.device"))
    distributed.start(device, timeout=config.longest_wait)
    return device


def models_of(
    config: Config,
    student: nn.Module,
    teacher: Teacher,
    vocabulary: int,
    device: torch.device,
    ends: tuple[int, ...],
) -> Models:
    """Both models, read as the config says."""
    return Models(
        student=student,
        teacher=teacher,
        vocabulary=vocabulary,
        device=device,
        max_tokens=config.optim.micro_batch_tokens,
        bf16=config.optim.bf16,
        dropout=config.student.dropout,
        keeps_graphs=not sharding.asked(config) or config.parallel.shard == "step",
        ends=ends,
    )


def in_world(
    config: Config, world: World | None, sampler: Engine, generators: Generators, longest: int
) -> tuple[Engine, Generators]:
    """Who samples the rollouts, and who writes for the method, in a world that spoils what the student writes
    in training."""
    if world is None or not world.spoils:
        return sampler, generators
    spoiling = SpoilingEngine(sampler, world, seed=config.run.seed, longest=longest)
    if not world.repeats:
        return spoiling, generators
    student = RepeatingEngine(generators.student, world, seed=config.run.seed, longest=longest)
    return spoiling, replace(generators, student=student)


def own_engine(
    config: Config, student: nn.Module, renderer: Renderer, stops: Stops, vocabulary: int
) -> HFEngine:
    """The engine over the very tensors that train."""
    return HFEngine(
        student,
        renderer,
        stop_ids=stops.ids,
        stop_strings=stops.strings,
        batch_tokens=config.rollout.batch_tokens,
        bf16=config.optim.bf16,
        vocabulary=vocabulary,
        shares_weights=True,
    )


def warnings_of(
    config: Config,
    prompts: Prompts,
    student: nn.Module,
    renderer: Renderer,
    stops: Stops,
    start: Trained | None,
) -> list[str]:
    """What to know before the first step."""
    found = [
        dropout_warning(config, student),
        scale_warning(config),
        sampling_warning(config, student),
        start_warning(config, start),
        clock_warning(renderer),
        thinking_warning(config, renderer),
        precision_warning(config),
        rate_warning(config),
        own_text_warning(config),
        stops.warning(renderer.tokens),
        *config.method.warnings,
        *(f"data.{key} has no effect here: the chat template ignores it" for key in renderer.unheard()),
        *(f"{key} has no effect here: it goes with {needs}" for key, needs in idle_options(config).items()),
        *data_warnings(prompts),
        *unknown_warnings(prompts, renderer),
    ]
    return [warning for warning in found if warning]


def own_text_warning(config: Config) -> str | None:
    """Where likelihood is raised of nothing but what the student has drawn."""
    method = config.method
    if method.divergence != "cross_entropy" or method.others_write or not method.trains_on_own_tokens:
        return None
    return (
        "method.divergence: cross_entropy trains the student on its own samples, and nothing that the "
        "teacher says enters the loss; SFT on the teacher's is method.writer: teacher"
    )


def rate_warning(config: Config) -> str | None:
    """Where the rate is the bundled student's by default."""
    section, own = config.optim, task_of(config.student.model) is not None
    default = section.lr == type(section).model_fields["lr"].default
    if own or not default or ("lr" in section.model_fields_set and config.student.lora_rank):
        return None
    return (
        f"optim.lr is {section.lr:g}, the default, which is the bundled student's; pretrained models want "
        "about 5e-6 for all weights, 1e-4 for LoRA"
    )


def data_warnings(prompts: Prompts) -> list[str]:
    """Where evaluations are over fewer problems than their files have, or over what was trained on."""
    found = [
        f"{count} bad rows of data.eval.{name} are left out: its accuracies are over the others"
        for name, count in prompts.skipped_evals.items()
    ]
    leaked, problems = trained_on(prompts.pool, prompts.evals)
    if leaked:
        found.append(
            f"{leaked} of {problems} evaluation problems are also training prompts: accuracy on them is no "
            "test"
        )
    return found


def unknown_warnings(prompts: Prompts, renderer: Renderer) -> list[str]:
    """Where the tokenizer lacks what prompts are written in: to the models they are full of holes."""
    found = []
    for name, some in {
        "train": prompts.pool,
        **{f"eval.{k}": held for k, held in prompts.evals.items()},
    }.items():
        looked_at = some_of(some)
        if lost := sum(renderer.holds_unknown(renderer.ids(prompt)) for prompt in looked_at):
            found.append(
                f"{lost} of {len(looked_at)} prompts of data.{name} hold the unknown token: the student's "
                "tokenizer lacks characters of theirs"
            )
    return found


def start_warning(config: Config, start: Trained | None) -> str | None:
    """Where the student is of a run that has not ended."""
    if start is None or not start.instead:
        return None
    return f"student.model is {start.shown(config.student.model)}: that run has no sound final model"


def clock_warning(renderer: Renderer) -> str | None:
    """Where the chat template prints the clock."""
    if renderer.clock is None:
        return None
    return (
        f"the chat template prints the clock; every prompt of this run says {renderer.clock:%Y-%m-%d %H:%M}, "
        f"also after a restart ({CLOCK_FILE})"
    )


def thinking_warning(config: Config, renderer: Renderer) -> str | None:
    """Where the student starts inside of thinking, and a teacher's text comes without any."""
    if not renderer.opens_thinking or all(t.engine != "chat" for t in config.taught_by.values()):
        return None
    return (
        f"the chat template ends in {renderer.opens_thinking}, and what a teacher writes behind "
        "teacher.engine: chat comes without its reasoning: answers are learnt as if they were thoughts; "
        "set data.enable_thinking: false, or name a template without the tag (data.chat_template)"
    )


def check_models(config: Config, models: Models, own: HFEngine, *, generates: bool) -> dict[str, Agreement]:
    """The start-up check of each model in this process.

    Args:
        own: over the student.
        generates: whether it is `own` that generates the rollouts.
    """
    check = partial(check_model, vocabulary=models.vocabulary, bf16=models.bf16)
    engine, method = own if generates else None, config.method
    # What no step makes whole stays in its shards.
    whole = generates or method.gathers_models or config.parallel.shard == "step"
    with sharding.whole(models.student if whole else None):
        found = {"student.model": check(models.student, engine, key="student.model", dropout=models.dropout)}
    for name in models.teacher.names:
        if (other := models.teacher.of(name).separate) is None:
            continue
        with sharding.whole(other if method.runs_models else None):
            asked = own.over(other) if sharding.is_whole(other) else None
            key = f"{teacher_option(name)}.model"
            found[key] = check(other, asked, key=key)
    sharding.give_back(models.student, *models.teacher.models)
    if sharding.asked(config):  # what was whole for the check leaves holes
        allocator.give_back()
    return found


def make_text(config: Config, renderer: Renderer, prompts: Prompts) -> Text:
    """Prompts, verdicts, rewards, and what the task knows."""
    data = config.data
    return Text(
        renderer=renderer,
        grader=grader_for(config.eval.grader, by_source(data, prompts.pool, prompts.evals)),
        templates=templates_of(data.train),
        task=task_of(data.train),
        correction_ids=correction_ids(config.method.correction_words, data.train, renderer.tokenizer),
        rewards=tuple(
            Reward(label=label, function=code.load(r.name, key=f"rewards.{label}"), weight=r.weight)
            for label, r in config.rewards.items()
        ),
    )
