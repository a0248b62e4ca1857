"""Near-future windows: the next K tokens of student and teacher from one prefix, and where they are compared.

Shape suffixes: F forks, K student's window, J teacher's window, M window tokens in all, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onpath.engines.base import Completion
from onpath.engines.branches import branch
from onpath.engines.hf import HFEngine
from onpath.errors import UserError
from onpath.forks import Fork, controlled, key_of
from onpath.methods.base import Tools
from onpath.models import unwrapped
from onpath.options import TOPDOptions
from onpath.reading import Reading
from onpath.records import Edit, Guidance, Rollout, Sampling, Trajectory
from onpath.teacher import ModelTeacher
from onpath.transport import window_divergence

_TOLERANCE = 1e-3  # of Sinkhorn's rows, which are normalised anyway: targets move by 2e-4 (total variation)


def horizon(rollout: Rollout, position: int, window: int) -> int:
    """Tokens of a window: K, but no further than a rollout that ran out of room could look."""
    left = len(rollout.ids) - position
    return min(window, left) if rollout.finish_reason == "length" else window


def with_windows(
    found: Sequence[Fork],
    rollouts: Sequence[Rollout],
    tools: Tools,
    options: TOPDOptions,
    step: int,
    reading: Reading | None = None,
) -> list[Fork]:
    """Forks with both futures.

    Args:
        rollouts: of the whole step; `Fork.row` points into them.
        step: seeds the draws of sampled windows.
        reading: the pass in which the teacher scored these rollouts; None reads each prefix anew.
    """
    keys = [f"{key_of(rollouts[f.row])}/{f.position}" for f in found]
    sampling = replace(
        tools.sampling,
        max_new_tokens=options.window,
        seed=tools.sampling.seed + step,
        temperature=options.teacher_temperature,
    )
    theirs = teacher_futures(found, rollouts, tools, sampling, [f"{k}/teacher" for k in keys], reading)
    ours = [rollouts[f.row].ids[f.position :] for f in found]
    if options.student_window == "regenerate":
        drawn = replace(sampling, temperature=tools.sampling.temperature)
        prefixes = [_prefix(f, rollouts) for f in found]
        written = tools.student.continue_from(prefixes, drawn, keys=[f"{k}/student" for k in keys])
        ours = [c.ids for c in written]
    ends = [horizon(rollouts[f.row], f.position, options.window) for f in found]
    return [
        replace(f, student=tuple(mine[:end]), teacher=tuple(c.ids[:end]))
        for f, mine, c, end in zip(found, ours, theirs, ends, strict=True)
    ]


def with_distances(
    found: Sequence[Fork], rollouts: Sequence[Rollout], tools: Tools, options: TOPDOptions
) -> list[Fork]:
    """D of every fork, exact, in one batch."""
    if not found:
        return []
    distance_F, _ = pairs_of(found, rollouts, tools, options).transport(epsilon=None)
    return [replace(f, distance=d) for f, d in zip(found, distance_F.tolist(), strict=True)]


def guidance_plans(
    guided: Sequence[Fork], rollouts: Sequence[Rollout], tools: Tools, options: TOPDOptions, step: int
) -> list[NDArray[np.float64]]:
    """γ [K, J] of each fork: Sinkhorn's, between the rollout's own tokens and the teacher's, or a control."""
    if not guided or options.plan == "teacher_window_ce":
        return [np.zeros((len(f.student), len(f.teacher))) for f in guided]
    own = [
        replace(f, student=rollouts[f.row].ids[f.position :][: options.window]) for f in guided
    ]  # with `regenerate`, f.student is a fresh sample, which nobody trains on
    _, plan_FKJ = pairs_of(own, rollouts, tools, options).transport(epsilon=options.epsilon)
    plans = plan_FKJ.double().cpu().numpy()
    seed = tools.sampling.seed + step
    return [
        controlled(plan_KJ[: len(f.student), : len(f.teacher)], f, options, seed)
        for f, plan_KJ in zip(own, plans, strict=True)
    ]


def spliced(guided: Sequence[Fork], rollouts: Sequence[Rollout], options: TOPDOptions) -> list[Trajectory]:
    """Control teacher_window_ce: y_<t with the teacher's window after it, for cross-entropy only.

    Its tokens have weight 0, so that they are neither in L_OPD nor in the count.
    """
    if options.plan != "teacher_window_ce":
        return []
    made = []
    for f in guided:
        end = None if options.first_tokens is None else max(0, options.first_tokens - f.position)
        prefix, window = _prefix(f, rollouts), f.teacher[:end]
        made.append(
            Trajectory(
                student_context=prefix,
                teacher_context=prefix,
                response=window,
                weights=(0.0,) * len(window),
                behaviour_logprobs=(0.0,) * len(window),
                guidance=(Guidance(start=0, targets=tuple({i: 1.0} for i in window)),),
                origin=rollouts[f.row],
                edit=Edit(kind="teacher_window", detail={"position": f.position}),
            )
        )
    return made


def teacher_futures(
    found: Sequence[Fork],
    rollouts: Sequence[Rollout],
    tools: Tools,
    sampling: Sampling,
    keys: Sequence[str],
    reading: Reading | None,
) -> list[Completion]:
    """What the teacher writes after y_<t: from its scoring pass if that was kept, else reading y_<t anew."""
    if reading is None or reading.past is None or not isinstance(tools.writer, HFEngine):
        return tools.speaker.continue_from([_prefix(f, rollouts) for f in found], sampling, keys=keys)
    rows = {id(t.origin): row for row, t in enumerate(reading.trajectories)}
    places = [(rows[id(rollouts[f.row])], len(rollouts[f.row].context) + f.position) for f in found]
    return branch(tools.writer, reading.past, places, sampling, keys=keys, drafts=reading.drafts())


def _prefix(fork: Fork, rollouts: Sequence[Rollout]) -> tuple[int, ...]:
    rollout = rollouts[fork.row]
    return rollout.context + rollout.ids[: fork.position]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The two windows of each fork, padded, as rows of a table of vectors."""

    student_FK: Tensor
    teacher_FJ: Tensor
    student_lengths: Tensor
    teacher_lengths: Tensor
    table: Tensor
    """[·, H]: token embeddings, and then the indices are token ids; or one vector per window token."""

    def transport(self, *, epsilon: float | None) -> tuple[Tensor, Tensor]:
        """Distances [F] and plans [F, K, J]."""
        return window_divergence(
            student_ids=self.student_FK,
            teacher_ids=self.teacher_FJ,
            embedding=self.table,
            epsilon=epsilon,
            tolerance=_TOLERANCE,
            student_lengths=self.student_lengths,
            teacher_lengths=self.teacher_lengths,
        )


def pairs_of(found: Sequence[Fork], rollouts: Sequence[Rollout], tools: Tools, options: TOPDOptions) -> Pairs:
    """The windows in the space that `embedding` names."""
    device = tools.measure.device
    student_FK, student_lengths = _padded([f.student for f in found], device)
    teacher_FJ, teacher_lengths = _padded([f.teacher for f in found], device)
    if options.embedding == "student_layer":
        table, student_FK, teacher_FJ = _in_context(found, rollouts, tools, options.embedding_layer)
    else:
        owner = tools.measure.student if options.embedding == "student" else _teacher_model(tools)
        layer = unwrapped(owner).get_input_embeddings()
        assert isinstance(layer, nn.Embedding)
        table = layer.weight.detach().to(device)
    return Pairs(
        student_FK=student_FK,
        teacher_FJ=teacher_FJ,
        student_lengths=student_lengths,
        teacher_lengths=teacher_lengths,
        table=table,
    )


def _padded(windows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, windows), default=0)
    rows = [[*w, *[0] * (longest - len(w))] for w in windows]
    lengths = torch.tensor([len(w) for w in windows], dtype=torch.long, device=device)
    return torch.tensor(rows, dtype=torch.long, device=device).reshape(len(windows), longest), lengths


def _teacher_model(tools: Tools) -> nn.Module:
    teacher = tools.measure.teacher
    if not isinstance(teacher, ModelTeacher):
        raise UserError("method.embedding teacher needs a teacher in this process; use student")
    return teacher.model


@torch.no_grad()
def _in_context(
    found: Sequence[Fork], rollouts: Sequence[Rollout], tools: Tools, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's hidden states at each window token, read after its prefix, and indices into them."""
    models = tools.measure
    rows = [(_prefix(f, rollouts), w) for f in found for w in (f.student, f.teacher)]
    vectors: list[Tensor] = []
    for prefix, window in rows:
        ids_1T = torch.tensor([[*prefix, *window]], device=models.device)
        states = unwrapped(models.student).get_decoder()(input_ids=ids_1T, output_hidden_states=True)
        vectors.append(states.hidden_states[layer][0, len(prefix) :])
    starts = torch.tensor([len(v) for v in vectors], device=models.device).cumsum(0)
    spans = [torch.arange(end - len(v), end) for v, end in zip(vectors, starts.tolist(), strict=True)]
    student_FK, _ = _padded([s.tolist() for s in spans[0::2]], models.device)
    teacher_FJ, _ = _padded([s.tolist() for s in spans[1::2]], models.device)
    return torch.cat(vectors), student_FK, teacher_FJ
