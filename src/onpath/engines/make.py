"""Who generates and who scores, as the config says: models in this process, a vLLM, servers."""

import copy
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from onpath.config.sections import Teacher as TeacherSection
from onpath.config.sections import teacher_option
from onpath.config.whole import Config
from onpath.data.render import Renderer
from onpath.engines import sharding
from onpath.engines.adapters import ends_adapted, is_adapter
from onpath.engines.ahead import AheadTeacher
from onpath.engines.base import Engine
from onpath.engines.head import head_of, unwrapped
from onpath.engines.hf import HFEngine
from onpath.engines.mixture import mixed_engines, mixed_teachers
from onpath.engines.models import (
    context_length,
    load_beside,
    load_model,
    locate,
    model_directory,
    pick_device,
    stays_beside,
)
from onpath.engines.remote.chat import ChatEngine
from onpath.engines.remote.handover import AdapterAlone, Handover, WholeWeights
from onpath.engines.remote.replay import Replay
from onpath.engines.remote.served import ServedTeacher
from onpath.engines.remote.server import ServerEngine
from onpath.engines.remote.transfer import OverNCCL
from onpath.engines.remote.wire import Line, Server
from onpath.engines.routed import RoutedEngine, RoutedTeacher
from onpath.engines.score_cache import CachedTeacher, ScoreStore, scoring_digest
from onpath.engines.stops import Stops
from onpath.engines.teacher import ModelTeacher, SelfTeacher, SilentTeacher, Teacher
from onpath.engines.vllm import VLLMEngine
from onpath.engines.weights import check_checkpoint, save_weights
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import place

_EXACT, _HALF = 1e-3, 0.5  # nats by which a vLLM's log-probs may differ from the trainer's, by dtype


def student_engine(
    config: Config, student: nn.Module, own: HFEngine, *, longest: Mapping[str, int]
) -> Engine:
    """Generates the rollouts and the evaluations.

    Args:
        own: over the student itself.
        longest: option that says how much is generated → tokens of the longest prompt that it is for.
    """
    # With rollout.overlap it generates from a thread of its own, and tokenizers are not safe to share.
    renderer = copy.deepcopy(own.renderer) if config.rollout.overlap else own.renderer
    section, half = config.rollout, config.optim.bf16 or config.student.dtype != "float32"
    if section.engine == "hf":
        return own
    check_checkpoint(student, "student.model")
    assert own.vocabulary is not None
    if section.url is not None:
        base = locate(config.student.model)
        if section.push == "adapter" and is_adapter(base):
            raise UserError(
                f"rollout.push: adapter goes beside a base that a server has, and student.model {base} is an "
                "adapter itself; leave rollout.push at weights"
            )
        server = Server(section, "rollout", [config.student.model, str(base)])
        _check_room(config, server, longest)
        return ServerEngine(
            server,
            renderer,
            stop_ids=own.stop_ids,
            stop_strings=own.stop_strings,
            vocabulary=own.vocabulary,
            student=student,
            handover=_handover(config, student, server, half=half),
            tolerance=_HALF if half else _EXACT,
            half=half,
        )
    with _directory(config, student, own) as directory:
        return VLLMEngine(
            student,
            directory,
            renderer,
            stop_ids=own.stop_ids,
            stop_strings=own.stop_strings,
            vocabulary=own.vocabulary,
            context_length=context_length(unwrapped(student).config),
            dtype="bfloat16" if half else "float32",
            tolerance=_HALF if half else _EXACT,
            options=section.vllm,
            timeout=config.longest_wait,
        )


def _check_room(config: Config, server: Server, longest: Mapping[str, int]) -> None:
    """A server that reads too little ends responses early, or refuses to begin them."""
    room = server.context_length
    if (found := config.too_long(longest, room)) is not None:
        option, prompt, new = found
        raise UserError(
            f"rollout.url: the server has room for {room} tokens, prompt and response, but a prompt has "
            f"{prompt} tokens and {option} is {new}; start it with --max-model-len {prompt + new}, or "
            f"lower {option}"
        )


def _handover(config: Config, student: nn.Module, server: Server, *, half: bool) -> Handover:
    """How the servers get the trained weights."""
    directory = Path(config.run.dir) / config.run.name / "weights"
    match config.rollout.push:
        case "adapter":
            return AdapterAlone(student, directory, server)
        case "nccl":
            return OverNCCL(student, dtype=torch.bfloat16 if half else None)
        case "weights":
            return WholeWeights(student, directory)


@contextmanager
def _directory(config: Config, student: nn.Module, own: HFEngine) -> Iterator[str]:
    """Weights that vLLM can start from: the student's directory, or a copy (of an adapter's model, say) that
    goes when vLLM has read it."""
    given = Path(locate(config.student.model))
    whole = (given / "config.json").is_file() and list(given.glob("*.safetensors")) and not is_adapter(given)
    # An adapter on head or embeddings unties them: vLLM would tie them again, as the given config may say.
    if not ends_adapted(unwrapped(student)) and (whole or not given.is_dir()):
        yield str(given)
        return
    merged = Path(distributed.first_decides(lambda: tempfile.mkdtemp(prefix="onpath-vllm-")))
    first = distributed.local_rank() == 0  # each host has a /tmp of its own
    try:
        save_weights(student, merged, here=first)
        if own.stop_strings and first:
            own.renderer.tokenizer.save_pretrained(merged)
        distributed.barrier()
        yield str(merged)
        distributed.barrier()
    finally:
        if first:
            shutil.rmtree(merged, ignore_errors=True)


def make_teacher(
    config: Config,
    student: nn.Module,
    renderer: Renderer,
    vocabulary: int,
    stops: Stops,
    device: torch.device,
) -> Teacher:
    """Other models, in this process or on servers, or the student itself."""
    method = config.method
    if method.teacher_weights is not None:
        return SelfTeacher(
            student,
            weights=method.teacher_weights,
            decay=method.teacher_decay,
            vocabulary=vocabulary,
            bf16=config.optim.bf16,
            alone=sharding.asked(config),
        )
    offloads = config.parallel.teacher == "offload"
    made: dict[tuple[Any, ...], Teacher] = {}
    # What is sharded layer by layer must be nobody else's, and 8-bit weights keep their scales apart.
    alone = sharding.asked(config) and config.parallel.teacher == "same"
    bases = _Bases({} if alone else config.taught_by, shards=alone)
    members: dict[str | None, Teacher] = {}
    homes: dict[str, torch.device] = {}
    for name, section in config.taught_by.items():
        key = teacher_option(name)
        home = pick_device(section.device, f"{key}.device", otherwise=device)
        if name is not None and offloads and section.engine == "hf":
            homes[name] = home
        same = _same_model(section, home)
        if same not in made:
            where = torch.device("cpu") if name in homes else home
            made[same] = _other_model(
                config, key, section, student, renderer, vocabulary, stops, bases, where
            )
        members[name] = made[same]
    if None in members:
        return members[None]
    routed = {str(name): teacher for name, teacher in members.items()}
    routed |= mixed_teachers(config.mixtures, routed)
    return RoutedTeacher(routed, homes=homes if offloads else None)


class _Bases:
    """Loads teachers; adapters of one base share it, where several are on it.

    Args:
        sections: of the teachers that may share one.
        shards: what is loaded is to be sharded.
    """

    def __init__(self, sections: Mapping[str | None, TeacherSection], *, shards: bool = False) -> None:
        mine = {n: s for n, s in sections.items() if s.engine == "hf" and s.quantization is None}
        self._users = Counter(self._of(s, teacher_option(n)) for n, s in mine.items() if len(mine) > 1)
        self._loaded: dict[tuple[Any, ...], Any] = {}
        self._shards = shards

    @staticmethod
    def _of(section: TeacherSection, key: str) -> tuple[Any, ...]:
        where = model_directory(section.model, f"{key}.model")
        return (*_same_model(section.model_copy(update={"model": where}), None), where)

    def load(self, section: TeacherSection, key: str, device: torch.device) -> nn.Module:
        """See `load_model`."""
        where = str(locate(section.model))
        adapter = is_adapter(where)
        if not self._users or (adapter and not stays_beside(where)):
            return load_model(section, f"{key}.model", device, shards=self._shards)
        base = self._of(section, key)
        if self._users[base] < 2:
            return load_model(section, f"{key}.model", device)
        if (base, device) not in self._loaded:
            plain = section.model_copy(update={"model": base[-1]})
            self._loaded[base, device] = load_model(plain, f"{key}.model", device)
        found: PreTrainedModel = self._loaded[base, device]
        return load_beside(section, f"{key}.model", found) if adapter else found


def _same_model(section: TeacherSection, home: torch.device | None) -> tuple[Any, ...]:
    """What makes two teachers one model: it is loaded once."""
    place = str(Path(locate(section.model)).resolve())
    code = section.trust_remote_code
    return code, place, section.engine, section.urls, section.dtype, str(home), str(section.quantization)


def _other_model(
    config: Config,
    key: str,
    section: TeacherSection,
    student: nn.Module,
    renderer: Renderer,
    vocabulary: int,
    stops: Stops,
    bases: _Bases,
    device: torch.device,
) -> Teacher:
    if section.engine == "chat":
        return SilentTeacher()
    if section.engine == "vllm":
        server = Server(section, key, [section.model, str(locate(section.model))])
        engine = ServerEngine(
            server, renderer, stop_ids=stops.ids, stop_strings=stops.strings, vocabulary=vocabulary
        )
        longest = context_length(unwrapped(student).config)
        k = min(config.method.support_k, vocabulary)
        return ServedTeacher(engine, k=k, context_length=longest)
    model = bases.load(section, key, device)
    rows = head_of(model).vocabulary
    if rows < vocabulary:
        raise UserError(
            f"{key}.model gives logits for {rows} ids only, but the student for {vocabulary}; resize its "
            "embeddings"
        )
    kind = AheadTeacher if _reads_ahead(config) else ModelTeacher
    return kind(model, vocabulary=vocabulary)


def _reads_ahead(config: Config) -> bool:
    """Whether the teacher idles while rollouts are written: by servers, and nothing trains meanwhile."""
    busy = config.rollout.overlap or sharding.asked(config) or set(config.taught_by) != {None}
    return bool(config.rollout.urls) and not busy and config.teacher.cache is None


def with_cache(config: Config, teacher: Teacher) -> Teacher:
    """The teacher, whose scores are kept where teacher.cache asks for it; of several each by its own section.
    Of a sharded one all processes take part."""
    if isinstance(teacher, RoutedTeacher):
        kept: dict[tuple[int, str | None], Teacher] = {}
        for name, section in config.taught_by.items():
            member = teacher.members[str(name)]
            same = id(member), section.cache
            kept[same] = kept.get(same) or _with_cache(config, section, member)
            teacher.members[str(name)] = kept[same]
        teacher.members |= mixed_teachers(config.mixtures, teacher.members)
        return teacher
    return _with_cache(config, config.teacher, teacher)


def _with_cache(config: Config, section: TeacherSection, teacher: Teacher) -> Teacher:
    if section.cache is None:
        return teacher
    store = ScoreStore(place(section.cache, key="teacher.cache"), most=section.cache_gb * 1e9)
    weights = f"{section.model}, {config.method.support_k} likeliest"
    if teacher.model is not None:
        weights = scoring_digest(teacher.model) + ", bfloat16 autocast" * teacher.bf16
    return CachedTeacher(teacher, store, weights=weights, dtype=getattr(torch, section.cache_dtype))


def check_teacher(config: Config, teacher: Teacher, longest: int) -> None:
    """It must be able to read what the student reads and generates.

    Args:
        longest: tokens of the longest prompt of the training data.
    """
    new, _ = config.longest_response
    for name in teacher.names:
        one = teacher.of(name)
        needed = longest + new + one.spare
        if needed > one.context_length and not config.method.self_taught:
            raise UserError(
                f"{teacher_option(name)}.model: its context of {one.context_length} tokens is too short for "
                f"prompts of up to {longest} and {new} new ones; lower "
                "rollout.max_new_tokens or drop long prompts"
            )


def teacher_engine(config: Config, teacher: Teacher, own: HFEngine, replay: Replay | None) -> Engine:
    """Generates in the teacher's name, or in each one's.

    Args:
        own: over the student itself; another model in this process gets its like.
        replay: answers of a black box that are kept.
    """
    if not isinstance(teacher, RoutedTeacher):
        return _engine_of(config, None, teacher, own, replay)
    members = {
        str(name): _engine_of(config, name, teacher.of(name), own, replay) for name in config.taught_by
    }
    return RoutedEngine(teacher, members | mixed_engines(config.mixtures, members))


def _engine_of(
    config: Config, name: str | None, teacher: Teacher, own: HFEngine, replay: Replay | None
) -> Engine:
    section = config.taught_by[name]
    if not teacher.gives_scores:
        return ChatEngine(
            Line(section, teacher_option(name)),
            section.model,
            own.renderer,
            stop_ids=own.stop_ids,
            stop_strings=own.stop_strings,
            extra=section.extra_body,
            replay=replay,
        )
    if isinstance(teacher, CachedTeacher):
        teacher = teacher.teacher
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
