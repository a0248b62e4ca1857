"""TOPD's third stage: the distance of two near futures, by optimal transport.

Shape suffixes: F forks, K student's window, J teacher's window, M window tokens in all, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from onpath.config.methods.topd import TOPDOptions
from onpath.engines.head import adapted_weight, decoder_of, evaluating, unwrapped
from onpath.methods.tools import Tools
from onpath.methods.topd.candidates import Fork
from onpath.records import Rollout
from onpath.system.errors import UserError
from onpath.transport.plans import window_divergence

AT_ONCE = 4096
"""Forks whose costs and plans, K × J numbers each, are in memory together."""
_TOLERANCE = 1e-3  # of the mass of Sinkhorn's rows; within a row targets move by up to 2e-3 (total variation)


def with_distances(
    found: Sequence[Fork], rollouts: Sequence[Rollout], tools: Tools, options: TOPDOptions
) -> list[Fork]:
    """D of every fork, exact, many at once."""
    done: list[Fork] = []
    for start in range(0, len(found), AT_ONCE):
        some = found[start : start + AT_ONCE]
        distance_F, _ = pairs_of(some, rollouts, tools, options).transport(epsilon=None)
        done += [replace(f, distance=d) for f, d in zip(some, distance_F.tolist(), strict=True)]
    return done


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
    owner = _teacher_model(tools) if options.embedding == "teacher" else tools.models.student
    pairs = of_tokens([f.student for f in found], [f.teacher for f in found], owner, tools.models.device)
    if options.embedding != "student_layer":
        return pairs
    table, student_FK, teacher_FJ = _in_context(found, rollouts, tools, options.embedding_layer)
    return replace(pairs, table=table, student_FK=student_FK, teacher_FJ=teacher_FJ)


def of_tokens(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], owner: nn.Module, device: torch.device
) -> Pairs:
    """Windows of token ids, by the embeddings of the model that owns them."""
    student_FK, student_lengths = _padded(ours, device)
    teacher_FJ, teacher_lengths = _padded(theirs, device)
    return Pairs(
        student_FK=student_FK,
        teacher_FJ=teacher_FJ,
        student_lengths=student_lengths,
        teacher_lengths=teacher_lengths,
        table=adapted_weight(unwrapped(owner).get_input_embeddings()).detach().to(device),
    )


def check_layer(options: TOPDOptions, student: nn.Module) -> None:
    """Whether the student has the hidden states that `embedding_layer` names.

    Raises:
        UserError: it has not.
    """
    model: Any = unwrapped(student)
    last = model.config.get_text_config().num_hidden_layers
    if options.embedding == "student_layer" and not -last - 1 <= options.embedding_layer <= last:
        raise UserError(
            f"method.embedding_layer is {options.embedding_layer}; the student has hidden states "
            f"0 to {last}, or {-last - 1} to -1"
        )


def _padded(windows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, windows), default=0)
    rows = [[*w, *[0] * (longest - len(w))] for w in windows]
    lengths = torch.tensor([len(w) for w in windows], dtype=torch.long, device=device)
    return torch.tensor(rows, dtype=torch.long, device=device).reshape(len(windows), longest), lengths


def _teacher_model(tools: Tools) -> nn.Module:
    model = tools.models.teacher.model
    if model is None:
        raise UserError("method.embedding teacher needs a teacher in this process; use student")
    return model


@torch.no_grad()
def _in_context(
    found: Sequence[Fork], rollouts: Sequence[Rollout], tools: Tools, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's hidden states at each window token, read after its prefix, and indices into them."""
    models = tools.models
    rows = [(rollouts[f.row].prefix(f.position), w) for f in found for w in (f.student, f.teacher)]
    vectors: list[Tensor] = []
    for prefix, window in rows:
        ids_1T = torch.tensor([[*prefix, *window]], device=models.device)
        with evaluating(models.student), models.autocast():
            states = decoder_of(models.student)(input_ids=ids_1T, output_hidden_states=True)
        vectors.append(states.hidden_states[layer][0, len(prefix) :])
    starts = torch.tensor([len(v) for v in vectors], device=models.device).cumsum(0)
    spans = [torch.arange(end - len(v), end) for v, end in zip(vectors, starts.tolist(), strict=True)]
    student_FK, _ = _padded([s.tolist() for s in spans[0::2]], models.device)
    teacher_FJ, _ = _padded([s.tolist() for s in spans[1::2]], models.device)
    return torch.cat(vectors), student_FK, teacher_FJ
