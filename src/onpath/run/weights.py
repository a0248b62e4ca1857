"""Which response tokens count, and how much: truncation and token weights of any method's trajectories."""

from collections.abc import Sequence
from dataclasses import replace

from onpath.methods import Prepared
from onpath.records import Trajectory
from onpath.run.parts import Parts
from onpath.system import distributed


def shaped(parts: Parts, prepared: Prepared) -> Prepared:
    """With `method.first_tokens` and `method.reweight` applied to what is trained on."""
    options, kept = parts.config.method, [t for t in prepared.trajectories if t.edit.kept]
    if options.first_tokens is not None:
        kept = [truncated(t, options.first_tokens) for t in kept]
    if options.reweight != "none":
        kept = reweighted(parts, kept)
    trained = iter(kept)
    return replace(
        prepared, trajectories=[next(trained) if t.edit.kept else t for t in prepared.trajectories]
    )


def truncated(trajectory: Trajectory, length: int) -> Trajectory:
    """Only the first `length` response tokens; the rest is neither read nor counted."""
    if len(trajectory.response) <= length:
        return trajectory
    behaviour = trajectory.behaviour_logprobs
    return replace(
        trajectory,
        response=trajectory.response[:length],
        weights=None if trajectory.weights is None else trajectory.weights[:length],
        guidance=tuple(
            replace(g, targets=g.targets[: length - g.start]) for g in trajectory.guidance if g.start < length
        ),
        behaviour_logprobs=None if behaviour is None else behaviour[:length],
    )


def reweighted(parts: Parts, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Weights in proportion to a statistic of each token, with mean 1 over the step's tokens of all
    processes; the order stays."""
    name = {
        "teacher_entropy": "teacher_entropy",
        "student_entropy": "student_entropy",
        "divergence": "reverse_kl",
    }[parts.config.method.reweight]
    found: list[tuple[Trajectory, list[float]]] = []
    for batch, stats in parts.tools.measure.batches(trajectories):
        found += zip(batch.trajectories, batch.by_row(getattr(stats, name)), strict=True)
    raw = [[w * s for w, s in zip(t.token_weights, values, strict=True)] for t, values in found]
    count = sum(sum(t.token_weights) for t, _ in found)
    weight, tokens = distributed.total([sum(map(sum, raw)), count], parts.device)
    scale = tokens / weight if weight > 0 else 0.0
    weighted = {
        id(t): replace(t, weights=tuple(w * scale for w in row))
        for (t, _), row in zip(found, raw, strict=True)
    }
    return [weighted.get(id(t), t) for t in trajectories]  # one without a response has nothing to weigh
