"""What a step's edits did, as sums with counts (see `Prepared.means`)."""

from collections.abc import Sequence
from dataclasses import replace

from onpath.engines.reading import Readings, Values, read
from onpath.methods.base import Tools, judging_context, own_response
from onpath.methods.trd.edits import CELLS, Rewrite
from onpath.records import Trajectory

Means = dict[str, tuple[float, float]]


def _mean(values: Sequence[float | bool]) -> tuple[float, float]:
    return float(sum(values)), float(len(values))


def edit_means(rewrites: Sequence[Rewrite], trajectories: Sequence[Trajectory]) -> Means:
    """Accuracies, the four cells, lengths and what looks wrong: all that needs no model."""
    judged = [w for w in rewrites if w.cell]
    written = [(w, t) for w, t in zip(rewrites, trajectories, strict=True) if w.kind != "none"]
    tokens_y, tokens_z = sum(len(w.attempt.ids) for w, _ in written), sum(len(w.ids) for w, _ in written)
    return {
        "accuracy_y": _mean([w.attempt_right is True for w in judged]),
        "accuracy_z": _mean([w.right is True for w in judged]),
        **{cell: _mean([w.cell == cell for w in judged]) for cell in CELLS},
        "length_ratio": (float(tokens_z), float(tokens_y)),
        "edit_distance_tokens": _mean([t.edit.detail["edit_distance"] for _, t in written]),
        "unfinished_z": _mean([not w.finished for w, _ in written]),
        **{
            f"{flaw}_z": _mean([t.edit.detail[flaw] for _, t in written])
            for flaw in ("empty", "identical", "foreign")
        },
        "kept_z": _mean([t.edit.kept for t in trajectories]),
    }


def read_along(
    trajectories: Sequence[Trajectory], tools: Tools, *, into: Readings | None = None
) -> list[Values]:
    """Per-token statistics of each trajectory; none where the response is empty."""
    readings = read(tools.measure, trajectories, into=into, mass_ids=tools.onset_ids)
    by_id = {id(t): values for reading in readings for t, values in reading.by_trajectory()}
    return [by_id.get(id(t), {}) for t in trajectories]


def token_means(values: Sequence[Values], verdicts: Sequence[bool | None]) -> Means:
    """Along y: divergence by verdict, epistemic mass, perplexity gap."""
    means: Means = {}
    for name, wanted in (("right", True), ("wrong", False)):
        kl = [
            x for v, ok in zip(values, verdicts, strict=True) if ok is wanted for x in v.get("reverse_kl", ())
        ]
        means[f"reverse_kl_y_{name}_nats"] = _mean(kl)
    return means | response_means(values, "y")


def response_means(values: Sequence[Values], name: str) -> Means:
    """Of one kind of response: the teacher's mass on openings of a correction, and by how much the teacher's
    log perplexity exceeds the student's, both over all tokens."""
    gaps = [
        s - t
        for v in values
        if "teacher_logp" in v
        for s, t in zip(v["student_logp"], v["teacher_logp"], strict=True)
    ]
    return {
        f"epistemic_mass_{name}": _mean([x for v in values for x in v.get("teacher_mass", ())]),
        f"log_perplexity_gap_{name}_nats": _mean(gaps),
    }


def measured(
    rewrites: Sequence[Rewrite], trajectories: Sequence[Trajectory], *, reference: bool, tools: Tools
) -> tuple[list[Trajectory], Means, Readings]:
    """Both responses read by both models, y by a teacher that has not seen it: trajectories with the
    student's log-probs in their edits, means, and what the loss can use again."""
    readings = Readings()
    attempts = [w.attempt for w in rewrites]
    unseen = [judging_context(r, reference=reference, tools=tools) for r in attempts]
    own = [own_response(r, teacher_context=c) for r, c in zip(attempts, unseen, strict=True)]
    along_y, along_z = read_along(own, tools), read_along(trajectories, tools, into=readings)
    means = token_means(along_y, [w.attempt_right for w in rewrites])
    gaps, noted = [], []
    for t, w, y, z in zip(trajectories, rewrites, along_y, along_z, strict=True):
        ours = {
            f"student_logp_{name}": sum(v["student_logp"]) / len(v["student_logp"])
            for name, v in (("y", y), ("z", z))
            if v
        }
        if "reverse_kl" in y:
            ours["reverse_kl_y_nats"] = sum(y["reverse_kl"]) / len(y["reverse_kl"])
        if y and z and w.kind != "none":
            gaps.append(ours["student_logp_z"] - ours["student_logp_y"])
        noted.append(replace(t, edit=replace(t.edit, detail={**t.edit.detail, **ours})))
    means |= {**response_means(along_z, "z"), "support_gap_nats": _mean(gaps)}
    return noted, means, readings
