"""Who generates and who scores, as the config says: models in this process, a vLLM, servers."""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from onpath.config.build import Config
from onpath.data.render import Renderer
from onpath.engines.adapters import ends_adapted, is_adapter
from onpath.engines.base import Engine
from onpath.engines.chat import ChatEngine
from onpath.engines.head import check_head, head_of, unwrapped
from onpath.engines.hf import HFEngine
from onpath.engines.models import context_length, load_model, locate, pick_device
from onpath.engines.replay import Replay
from onpath.engines.score_cache import CachedTeacher, ScoreStore, weights_digest
from onpath.engines.served import ServedTeacher
from onpath.engines.stops import Stops
from onpath.engines.teacher import ModelTeacher, SelfTeacher, SilentTeacher, Teacher
from onpath.engines.wire import Line
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import place

_EXACT, _HALF = 1e-3, 0.5  # nats by which a vLLM's log-probs may differ from the trainer's, by dtype


def student_engine(config: Config, student: nn.Module, own: HFEngine) -> Engine:
    """Generates the rollouts and the evaluations.

    Args:
        own: over the student itself.
    """
    # With rollout.overlap it generates from a thread of its own, and tokenizers are not safe to share.
    renderer = copy.deepcopy(own.renderer) if config.rollout.overlap else own.renderer
    section, half = config.rollout, config.optim.bf16 or config.student.dtype != "float32"
    if section.engine == "hf":
        return own
    assert own.vocabulary is not None
    if section.url is not None:
        from onpath.engines.server import ServerEngine
        from onpath.engines.wire import Server

        return ServerEngine(
            Server(section, "rollout", [config.student.model, str(locate(config.student.model))]),
            renderer,
            stop_ids=own.stop_ids,
            stop_strings=own.stop_strings,
            vocabulary=own.vocabulary,
            student=student,
            weights=Path(config.run.dir) / config.run.name / "weights",
            tolerance=_HALF if half else _EXACT,
            half=half,
        )
    from onpath.engines.vllm import VLLMEngine

    return VLLMEngine(
        student,
        _directory(config, student, own),
        renderer,
        stop_ids=own.stop_ids,
        stop_strings=own.stop_strings,
        vocabulary=own.vocabulary,
        context_length=context_length(unwrapped(student).config),
        dtype="bfloat16" if half else "float32",
        tolerance=_HALF if half else _EXACT,
        options=section.vllm,
    )


def _directory(config: Config, student: nn.Module, own: HFEngine) -> str:
    """Weights that vLLM can start from: the student's directory, or a copy (of an adapter's model, say)."""
    from onpath.engines.weights import save_weights

    given = Path(locate(config.student.model))
    whole = (given / "config.json").is_file() and list(given.glob("*.safetensors")) and not is_adapter(given)
    # An adapter on head or embeddings unties them: vLLM would tie them again, as the given config may say.
    if not ends_adapted(unwrapped(student)) and (whole or not given.is_dir()):
        return str(given)
    merged = Path(distributed.first_decides(lambda: tempfile.mkdtemp(prefix="onpath-vllm-")))
    first = distributed.local_rank() == 0  # each host has a /tmp of its own
    save_weights(student, merged, here=first)
    if own.stop_strings and first:
        own.renderer.tokenizer.save_pretrained(merged)
    distributed.barrier()
    return str(merged)


def make_teacher(
    config: Config,
    student: nn.Module,
    renderer: Renderer,
    vocabulary: int,
    stops: Stops,
    device: torch.device,
) -> Teacher:
    """Another model, in this process or on a server, or the student itself."""
    method = config.method
    if method.teacher_weights is not None:
        return SelfTeacher(
            student, weights=method.teacher_weights, decay=method.teacher_decay, vocabulary=vocabulary
        )
    if config.teacher.engine == "chat":
        return SilentTeacher()
    if config.teacher.engine == "vllm":
        from onpath.engines.server import ServerEngine
        from onpath.engines.wire import Server

        names = [config.teacher.model, str(locate(config.teacher.model))]
        server = Server(config.teacher, "teacher", names)
        engine = ServerEngine(
            server, renderer, stop_ids=stops.ids, stop_strings=stops.strings, vocabulary=vocabulary
        )
        longest = context_length(unwrapped(student).config)
        return ServedTeacher(engine, k=min(method.support_k, vocabulary), context_length=longest)
    where = pick_device(config.teacher.device, "teacher.device", otherwise=device)
    model = load_model(config.teacher, "teacher.model", where)
    check_head(model, "teacher.model")
    rows = head_of(model).vocabulary
    if rows < vocabulary:
        raise UserError(
            f"teacher.model gives logits for {rows} ids only, but the student for {vocabulary}; resize its "
            "embeddings"
        )
    return ModelTeacher(model, vocabulary=vocabulary)


def with_cache(config: Config, teacher: Teacher) -> Teacher:
    """The teacher, whose scores are kept where teacher.cache asks for it. Of a sharded one all processes take
    part."""
    section = config.teacher
    if section.cache is None:
        return teacher
    store = ScoreStore(place(section.cache, key="teacher.cache"), most=section.cache_gb * 1e9)
    weights = f"{section.model}, {config.method.support_k} likeliest"
    if teacher.model is not None:
        weights = weights_digest(teacher.model, trained=False)
    return CachedTeacher(teacher, store, weights=weights, dtype=getattr(torch, section.cache_dtype))


def check_teacher(config: Config, teacher: Teacher, longest: int) -> None:
    """It must be able to read what the student reads and generates.

    Args:
        longest: tokens of the longest prompt.
    """
    needed = longest + config.rollout.max_new_tokens + teacher.spare
    if needed > teacher.context_length and not config.method.self_taught:
        raise UserError(
            f"teacher.model: its context of {teacher.context_length} tokens is too short for prompts of up "
            f"to {longest} and {config.rollout.max_new_tokens} new ones; lower rollout.max_new_tokens or "
            "drop long prompts"
        )


def teacher_engine(config: Config, teacher: Teacher, own: HFEngine, replay: Replay | None) -> Engine:
    """Generates in the teacher's name.

    Args:
        own: over the student itself; another model in this process gets its like.
        replay: answers of a black box that are kept.
    """
    if not teacher.gives_scores:
        section, line = config.teacher, Line(config.teacher, "teacher")
        return ChatEngine(
            line,
            section.model,
            own.renderer,
            stop_ids=own.stop_ids,
            stop_strings=own.stop_strings,
            extra=section.extra_body,
            replay=replay,
        )
    return teacher.engine if isinstance(teacher, ServedTeacher) else own.over(_model(teacher))


def _model(teacher: Teacher) -> nn.Module:
    assert teacher.model is not None, "a teacher that scores is a model in this process or on a server"
    return teacher.model


def make_replay(config: Config) -> Replay | None:
    """What a black box has answered, kept on disk, where rollouts are kept too: a killed run does not pay for
    it again."""
    if config.refresh is None:
        return None
    return Replay(Path(config.run.dir) / config.run.name / "cache")
