"""What a step's rewrites did, as sums with counts (see `Prepared.means`)."""

from collections.abc import Sequence
from dataclasses import replace

from onpath.engines.forward import Kept, per_token
from onpath.methods.base import own_response
from onpath.methods.diagnose import Means, mean, response_means, token_means
from onpath.methods.tools import Tools
from onpath.methods.trd.edits import CELLS, Rewrite
from onpath.records import Trajectory


def edit_means(rewrites: Sequence[Rewrite], trajectories: Sequence[Trajectory]) -> Means:
    """Accuracies, the four cells, lengths and what looks wrong: all that needs no model."""
    judged = [w for w in rewrites if w.cell]
    rewritten = [(w, t) for w, t in zip(rewrites, trajectories, strict=True) if w.kind != "none"]
    tokens_y, tokens_z = sum(len(w.attempt.ids) for w, _ in rewritten), sum(len(w.ids) for w, _ in rewritten)
    return {
        "accuracy_y": mean([w.attempt_right is True for w in judged]),
        "accuracy_z": mean([w.right is True for w in judged]),
        **{cell: mean([w.cell == cell for w in judged]) for cell in CELLS},
        "length_ratio": (float(tokens_z), float(tokens_y)),
        "edit_distance_tokens": mean([t.edit.detail["edit_distance"] for _, t in rewritten]),
        "unfinished_z": mean([not w.finished for w, _ in rewritten]),
        **{
            f"{flaw}_z": mean([t.edit.detail[flaw] for _, t in rewritten])
            for flaw in ("empty", "identical", "foreign")
        },
        "kept_z": mean([t.edit.kept for t in trajectories]),
    }


def measured(
    rewrites: Sequence[Rewrite], trajectories: Sequence[Trajectory], *, reference: bool, tools: Tools
) -> tuple[list[Trajectory], Means, Kept]:
    """Both models along both responses, y in the context of a teacher that has not seen it: trajectories with
    the student's log-probs in their edits, means, and what the loss can use again."""
    kept, text = Kept(), tools.text
    attempts = [w.attempt for w in rewrites]
    room = tools.models.teacher.room
    unseen = [text.judging_context(r, reference=reference, room=room(len(r.ids))) for r in attempts]
    own = [own_response(r, teacher_context=c) for r, c in zip(attempts, unseen, strict=True)]
    along_y = per_token(tools.models, own, mass_ids=text.correction_ids)
    along_z = per_token(tools.models, trajectories, keep=kept, mass_ids=text.correction_ids)
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
    means |= {**response_means(along_z, "z"), "support_gap_nats": mean(gaps)}
    return noted, means, kept
