"""Which response tokens count, and how much: truncation, rewards and token weights of any method's
trajectories."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from onpath.engines.forward import forward
from onpath.methods.base import Prepared
from onpath.records import Guidance, Trajectory
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.system.draws import noise
from onpath.system.errors import UserError

_STATISTIC = {
    "teacher_entropy": "teacher_entropy",
    "student_entropy": "student_entropy",
    "divergence": "reverse_kl",
}


def shaped(
    parts: Parts, prepared: Prepared, rewards: Mapping[str, Sequence[float]] | None = None, *, step: int = 0
) -> Prepared:
    """With the config's rewards, `method.first_tokens`, `random_share` and `reweight` applied to what is
    trained on, and every trajectory knowing its place.

    Args:
        rewards: label → one value per rollout of the step (of this process).
    """
    options = parts.config.method
    trajectories = filtered(parts, prepared.trajectories, rewards or {})
    kept = [t for t in trajectories if t.edit.kept]
    if options.first_tokens is not None:
        kept = [t.truncated(max(0, options.first_tokens - t.begins)) for t in kept]
    if options.random_share < 1:
        seed = parts.config.run.seed
        before = Counter[str]()  # of one rollout there may be several
        for i, t in enumerate(kept):
            who = "" if t.origin is None else t.origin.key
            key = f"step {step}/{who}/share" + f" {before[who]}" * (before[who] > 0)
            kept[i] = thinned(t, options.random_share, seed=seed, key=key)
            before[who] += 1
    kept = rewarded(parts, kept, rewards or {})
    if options.reweight != "none":
        kept = reweighted(parts, kept)
    trained = iter(kept)
    placed = [
        replace(next(trained) if t.edit.kept else t, place=place) for place, t in enumerate(trajectories)
    ]
    return replace(prepared, trajectories=placed)


def thinned(trajectory: Trajectory, share: float, *, seed: int, key: str) -> Trajectory:
    """With weight 0 for all but a share of the tokens, by lot: they leave the loss, its guidance and its
    count.

    Args:
        key: names the lots.
    """
    stays = (noise(seed, key, len(trajectory.response)) < share).tolist()
    weights = tuple(w if s else 0.0 for w, s in zip(trajectory.token_weights, stays, strict=True))
    counted = tuple(c and s for c, s in zip(trajectory.in_count, stays, strict=True))
    guidance = tuple(part for g in trajectory.guidance for part in _staying(g, stays))
    return replace(trajectory, weights=weights, counted=counted, guidance=guidance)


def _staying(guidance: Guidance, stays: Sequence[bool]) -> Iterator[Guidance]:
    """Guidance of the tokens that stay, in pieces."""
    placed = enumerate(guidance.targets, start=guidance.start)
    for kept, run in groupby(placed, key=lambda pair: stays[pair[0]]):
        if kept:
            piece = list(run)
            yield Guidance(start=piece[0][0], targets=tuple(target for _, target in piece))


def filtered(
    parts: Parts, trajectories: Sequence[Trajectory], rewards: Mapping[str, Sequence[float]]
) -> list[Trajectory]:
    """Trajectories of rollouts below a reward's `at_least` dropped."""
    found = list(trajectories)
    for label, section in parts.config.rewards.items():
        if section.at_least is not None:
            values = _of_rollouts(found, rewards[label])
            low = [v is not None and v < section.at_least for v in values]
            found = [_dropped(t, f"reward {label}") if out else t for t, out in zip(found, low, strict=True)]
    return found


def rewarded(
    parts: Parts, kept: Sequence[Trajectory], rewards: Mapping[str, Sequence[float]]
) -> list[Trajectory]:
    """Weights by the rewards with `weights_tokens`, scaled over what is left of the step."""
    found = list(kept)
    for label, section in parts.config.rewards.items():
        if section.weights_tokens:
            of = _of_rollouts(found, rewards[label])
            if any(v is not None and v < 0 for v in of):
                raise UserError(f"rewards.{label}.weights_tokens: its values must be at least 0")
            factors = [1.0 if v is None else v for v in of]
            values = [[f] * len(t.response) for t, f in zip(found, factors, strict=True)]
            scale = _scale(parts, found, values)
            found = [_weighed(t, f * scale) for t, f in zip(found, factors, strict=True)]
    return found


def _weighed(trajectory: Trajectory, factor: float) -> Trajectory:
    """All tokens by one factor, in the loss and in its guidance."""
    guidance = tuple(g.scaled(factor) for g in trajectory.guidance if factor)
    return replace(trajectory.reweighted([factor] * len(trajectory.response)), guidance=guidance)


def _of_rollouts(trajectories: Sequence[Trajectory], values: Sequence[float]) -> list[float | None]:
    return [None if t.origin is None else values[t.origin.place] for t in trajectories]


def _dropped(trajectory: Trajectory, reason: str) -> Trajectory:
    if not trajectory.edit.kept:
        return trajectory
    return replace(trajectory, edit=replace(trajectory.edit, kept=False, reason=reason))


def reweighted(parts: Parts, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Weights in proportion to a statistic of each token; the order stays."""
    name, values = _STATISTIC[parts.config.method.reweight], [[0.0] * len(t.response) for t in trajectories]
    for one in forward(parts.models, trajectories):
        for place, found in one.by_place([name]):
            values[place] = found[name]
    return weighted(parts, trajectories, values)


def weighted(
    parts: Parts, trajectories: Sequence[Trajectory], values: Sequence[Sequence[float]]
) -> list[Trajectory]:
    """Weights times values, scaled to mean 1 over the tokens of all processes that are trained on."""
    scale = _scale(parts, trajectories, values)
    return [
        t.reweighted([v * scale for v in row]) if row else t
        for t, row in zip(trajectories, values, strict=True)
    ]


def _scale(parts: Parts, trajectories: Sequence[Trajectory], values: Sequence[Sequence[float]]) -> float:
    """What the values are to be multiplied with for that."""
    kept = [(t, row) for t, row in zip(trajectories, values, strict=True) if t.edit.kept]
    mine = [
        sum(w * v for t, row in kept for w, v in zip(t.token_weights, row, strict=True)),
        sum(sum(t.token_weights) for t, _ in kept),
    ]
    weight, tokens = distributed.total(mine, parts.models.device)
    return tokens / weight if weight > 0 else 0.0
