"""From a config to the parts of a run. Cheap checks come first: nothing large loads before the data is known
to be good.
"""

import torch
from torch import nn

from onpath.config.build import Config
from onpath.data.tasks import checker_of, onset_ids, templates_for
from onpath.engines.head import check_head, head_of
from onpath.engines.hf import HFEngine
from onpath.engines.make import (
    check_teacher,
    make_teacher,
    make_writer,
    offline_cache,
    room_of,
    student_engine,
)
from onpath.engines.models import load_model, load_tokenizer, pick_device, stop_ids
from onpath.engines.overlap import make_ahead
from onpath.engines.reading import Measure
from onpath.engines.student import shared_vocabulary, trainable
from onpath.grade.graders import grader_for
from onpath.methods import Tools, make_method
from onpath.methods.opsd import OPSD
from onpath.records import Sampling
from onpath.run.gradient_cosine import GradientCosine
from onpath.run.inputs import check_prompts, load_data, make_renderer
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.system.allocator import keep_freed_memory


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
