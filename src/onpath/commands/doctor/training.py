"""Checks of what is trained on: EOS, the gradient, TRD's rewrites."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onpath.commands.doctor.finding import Finding, skipped
from onpath.commands.doctor.sample import (
    Probe,
    batches_of,
    own_scores,
    rows_of,
    teacher_scores,
    teachers_whole,
    unread,
    without_guidance,
)
from onpath.config.sections import teacher_option
from onpath.data.batch import Batch, collate
from onpath.data.render import Renderer
from onpath.engines.head import sharded
from onpath.engines.sharding import full, give_back
from onpath.engines.stops import string_end
from onpath.losses import TeacherScores
from onpath.records import Rollout, Sampling, Trajectory
from onpath.run.loss import Step, loss_of
from onpath.run.parts import Parts
from onpath.system import distributed

_UNFINISHED = 0.5
"""Share of rollouts cut at max_new_tokens from which the check warns."""
_GRADED = 4
"""Trajectories whose gradient is formed, three times."""
_ENDS = 4
"""Finished responses at whose ends both models are asked for their stop tokens."""
_FITS = 0.5
"""Share of the targets' mass on the teacher's likeliest token below which the check warns."""
_SAME_GRADIENT = 1e-3
"""Relative difference below which two gradients are one."""


def eos(parts: Parts, probe: Probe) -> Finding:
    """Responses end with a stop token, it is in the ids, and the loss counts it."""
    stops, strings, text = parts.stops.ids, parts.stops.strings, parts.text.renderer.text
    finished = [r for r in probe.rollouts if r.finish_reason == "stop"]
    unfinished = 1 - len(finished) / max(1, len(probe.rollouts))
    ended = [r for r in finished if string_end(r.ids, strings, text) is None]  # the others have no stop token
    masses = _end_masses(parts, ended)
    stripped = sum(not r.ids or r.ids[-1] not in stops for r in ended)
    present = [t for t in probe.trajectories if t.response[-1] in stops]
    # A stop that others drew is nothing that the student must learn where it is not trained on their words.
    masked = sum(_final_weight(parts, t) == 0 and t.written_by[-1] == "student" for t in present)
    closing = _turn_end(parts.text.renderer, stops)
    values = {
        "stop_ids": sorted(stops),
        "rollouts": len(probe.rollouts),
        "finished": len(finished),
        "unfinished_share": unfinished,
        "without_their_stop_token": stripped,
        "trained_with_stop_token": len(present),
        "of_which_masked": masked,
        "end_mass": masses,
    }

    def found(status: str, message: str, advice: str = "") -> Finding:
        return Finding(name="eos", status=status, message=message, advice=advice, values=values)  # type: ignore[arg-type]

    if closing:
        message = f"the chat template closes an answer with {closing!r}, which ends no response (stops: "
        message += ", ".join(map(repr, parts.text.renderer.tokens(sorted(stops)))) + ")"
        return found("fail", message, "add its id to eos_token_id in the student's generation_config.json")
    if stripped:
        message = f"{stripped} of {len(ended)} finished rollouts lack their stop token"
        return found("fail", message, "the engine strips it: the student would never learn to stop")
    if masked:
        message = f"the stop token has weight 0 in {masked} of {len(present)} trajectories that end with it"
        return found("fail", message, "it must count, or the student never learns to stop")
    if ended and not present:
        reason = (
            "method.paper_compat takes it out" if not parts.config.method.supervises_end else "it was cut off"
        )
        message = f"{len(ended)} rollouts finished, but no trained response ends with a stop token: {reason}"
        return found("warning", message, "the student is not taught to stop")
    likeliest = {side: max(of, key=lambda i: of[i]) for side, of in masses.items()}
    if len(set(likeliest.values())) > 1:
        message = "where responses end the models put most of it on different stop tokens: " + ", ".join(
            f"the {side} {masses[side][i]:.0%} on {i} {parts.text.renderer.tokens([int(i)])[0]!r}"
            for side, i in likeliest.items()
        )
        advice = "all of them end a response here, but the loss tells them apart: method.ends: one does not"
        return found(
            "ok" if parts.objective.ends else "warning", message, "" if parts.objective.ends else advice
        )
    message = (
        f"{len(finished)} of {len(probe.rollouts)} rollouts finished, {unfinished:.0%} did not; the stop "
        "token counts in "
        f"{len(present)} of {len(probe.trajectories)} trained responses"
    )
    if probe.shortened:
        return found("ok", message + "; longer ones were cut short here")
    if unfinished > _UNFINISHED and parts.config.method.trains_on_rollouts:
        return found("warning", message, "most responses are cut: raise rollout.max_new_tokens")
    return found("ok", message)


def gradient(parts: Parts, probe: Probe) -> Finding:
    """Another teacher gives another gradient, and the student itself as teacher gives none."""
    if not parts.objective.needs_teacher:
        return skipped("gradient", f"{parts.objective.name} trains without a teacher's scores")
    if any(t.advantages is not None for t in probe.trajectories):
        return skipped("gradient", "the method gives each token its advantage")
    batch = next(batches_of(parts, without_guidance(probe.trajectories[:_GRADED])))
    order = torch.arange(len(batch.token_N) - 1, -1, -1, device=parts.models.device)
    real = _gradient(parts, batch, teacher_scores(parts, batch))
    # The same scores, of other positions; read anew, for a sharded teacher has given its head back.
    other = _gradient(parts, batch, rows_of(teacher_scores(parts, batch), order))
    with torch.no_grad():
        itself = own_scores(parts.models.student_states(batch), parts.models.head)
    equal = _gradient(parts, batch, itself)
    norm, at_self = _norm(real), _norm(equal)
    apart = _norm([a - b for a, b in zip(real, other, strict=True)])
    values = {"norm": norm, "other_teacher_differs_by": apart, "norm_with_student_as_teacher": at_self}
    if not math.isfinite(norm):
        message, advice = (
            "the gradient is not finite",
            "use float32 instead of half precision, and look at the data",
        )
        return Finding(name="gradient", status="fail", message=message, advice=advice)
    if norm < _SAME_GRADIENT * apart:  # nothing to compare with, and nothing wrong with the loss
        message = f"norm {norm:.2g}, and {_norm(other):.2g} with another teacher's scores: this one "
        message += "teaches the student nothing that it does not do (see teacher_differs)"
        return Finding(name="gradient", status="skipped", message=message, values=values)
    share = apart / norm if norm else 0.0
    rest = at_self / norm if norm else 0.0
    message = (
        f"norm {norm:.2g}; with another teacher's scores it differs by {share:.0%}, with the student's own "
    )
    message += f"scores {rest:.1%} of it is left"
    if share <= _SAME_GRADIENT:
        advice = "the loss does not depend on the teacher: this trains on noise"
        return Finding(name="gradient", status="fail", message=message, advice=advice, values=values)
    if parts.objective.teacher_temperature != 1:
        message += ": method.teacher_temperature has another optimum, deliberately"
    elif rest > 0.05:
        advice = "the loss is not least where student and teacher agree"
        return Finding(name="gradient", status="fail", message=message, advice=advice, values=values)
    return Finding(name="gradient", status="ok", message=message, values=values)


def guidance(parts: Parts, probe: Probe) -> Finding:
    """Do the targets fit the student's own contexts?"""
    on_teacher, count = probe.prepared.means.get("target_teacher_share", (0.0, 0.0))
    if not count:
        return skipped("guidance", f"{parts.config.method.name} guides no token here")
    names = ("target_own_share", "target_entropy_nats")
    own, entropy = (probe.prepared.means[name][0] / count for name in names)
    share = on_teacher / count
    values = {"tokens": count, "on_teacher": share, "on_own": own, "entropy_nats": entropy}
    message = (
        f"{share:.0%} of the targets' mass lies on what the teacher would say in the student's context, "
        f"{own:.0%} on the student's own token ({count:.0f} tokens, entropy {entropy:.2f} nats)"
    )
    if share >= _FITS:
        return Finding(name="guidance", status="ok", message=message, values=values)
    advice = (
        "the rest teaches another context's tokens: use method.mass: literal, method.plan: spliced, or relay"
    )
    return Finding(name="guidance", status="warning", message=message, advice=advice, values=values)


def refine(parts: Parts) -> Finding:
    """TRD's gate: does the rewriter help on this student's real attempts?"""
    with parts.whole():
        found = parts.method.rehearse(parts.prompts.pool)
    if found is None:
        return skipped("refine", f"{parts.config.method.name} rewrites nothing")
    values = dict(found.values)
    if not found.refusal:
        return Finding(name="refine", status="ok", message=found.sentence, values=values)
    return Finding(
        name="refine",
        status="fail" if found.binding else "warning",
        message=f"{found.refusal}: {found.sentence}",
        advice="use a teacher that can rewrite this student's attempts, or another method.template",
        values=values,
    )


def method_kept(parts: Parts, probe: Probe) -> Finding:
    """How much of what was sampled is trained on."""
    kept, made = len(probe.trajectories), len(probe.prepared.trajectories)
    values = {"rollouts": len(probe.rollouts), "trajectories": made, "kept": kept}
    message = f"{kept} of {made} trajectories from {len(probe.rollouts)} rollouts are trained on"
    shares = {name: total / count for name, (total, count) in probe.prepared.means.items() if count}
    if kept and (nothing := parts.config.method.nothing_found(shares)):
        return Finding(name="trajectories", status="warning", message=f"{message}; {nothing}", values=values)
    if kept:
        return Finding(name="trajectories", status="ok", message=message, values=values)
    if probe.refused:
        return Finding(name="trajectories", status="fail", message=probe.refused, values=values)
    reasons = sorted({t.edit.reason for t in probe.prepared.trajectories}) or ["nothing was sampled"]
    advice = f"the reasons are: {', '.join(reasons)}"
    return Finding(name="trajectories", status="fail", message=message, advice=advice, values=values)


def contexts(parts: Parts, probe: Probe) -> Finding:
    """Both contexts begin alike, and the student's is what its prompt renders to."""
    bos = parts.text.renderer.tokenizer.bos_token_id
    one_sided = sum(
        (t.student_context[0] == bos) != (t.teacher_context[0] == bos) for t in probe.trajectories
    )
    twice = sum(
        bos is not None and (bos, bos) in (t.student_context[:2], t.teacher_context[:2])
        for t in probe.trajectories
    )
    foreign = sum(_foreign(parts, r) for r in probe.rollouts)
    values = {"bos_on_one_side": one_sided, "bos_twice": twice, "not_the_rendered_prompt": foreign}
    total = len(probe.trajectories)
    if one_sided and bos is not None:
        message = f"{one_sided} of {total} trajectories begin with BOS on one side only"
    elif twice:
        message = f"{twice} of {total} trajectories begin with BOS twice"
    elif foreign:
        message = f"{foreign} of {len(probe.rollouts)} rollouts continue other ids than their rendered prompt"
    else:
        longest = max(len(t.teacher_context) - len(t.student_context) for t in probe.trajectories)
        message = f"both contexts begin alike; the teacher's is at most {longest} tokens longer"
        return Finding(name="contexts", status="ok", message=message, values=values)
    advice = "student and teacher must read the same prompt: look at tokenizer and engine"
    return Finding(name="contexts", status="fail", message=message, advice=advice, values=values)


def accuracy(parts: Parts, probe: Probe) -> Finding:
    """Is anybody right? The student's samples and as many of the teacher's own, greedy, graded."""
    graded = [r for r in probe.rollouts if r.prompt.answer is not None]
    if not graded:
        return skipped("accuracy", "no training prompt has an answer")
    if probe.shortened:
        return skipped("accuracy", "responses may be long, and were cut short here")
    greedy = replace(parts.sampling, temperature=0.0, top_p=1.0, top_k=0)
    writing = [r for r in graded if parts.generators.teacher.of(r.prompt.teacher).generates]
    asked = bool(writing) and not parts.config.method.self_taught
    with parts.whole():
        theirs = _teacher_on(parts, writing, greedy) if asked and teachers_whole(parts) else []
    student = sum(bool(ok) for ok in parts.text.right([(r, r.ids) for r in graded]))
    teacher = sum(bool(ok) for ok in parts.text.right(theirs))
    values = {"graded": len(graded), "student_right": student, "teacher_right": teacher if theirs else None}
    for name in parts.config.teachers:
        mine = [(r, ids) for r, ids in theirs if r.prompt.teacher == name]
        right = sum(bool(ok) for ok in parts.text.right(mine))
        values |= {f"teachers.{name}_graded": len(mine), f"teachers.{name}_right": right}
    message = f"student right on {student} of {len(graded)} prompts"
    message += f", teacher (greedy) on {teacher}" if theirs else ""
    if student + teacher == 0:
        advice = "are the answers readable, the prompts in the models' format, max_new_tokens long enough?"
    elif theirs and teacher < student:
        advice = "the teacher does worse than the student: is it the right one, does it know this format?"
    else:
        return Finding(name="accuracy", status="ok", message=message, values=values)
    return Finding(name="accuracy", status="warning", message=message, advice=advice, values=values)


def _teacher_on(
    parts: Parts, rollouts: Sequence[Rollout], sampling: Sampling
) -> list[tuple[Rollout, tuple[int, ...]]]:
    """The same prompts, answered in the teacher's name."""
    asked, prefixes = [r.prompt for r in rollouts], [r.context for r in rollouts]
    keys = [f"doctor/{i}" for i in range(len(asked))]
    answers = parts.tools.in_teachers_name(asked, prefixes, sampling, keys=keys)
    return [(r, a.ids) for r, a in zip(rollouts, answers, strict=True)]


def _foreign(parts: Parts, rollout: Rollout) -> bool:
    return rollout.context != parts.text.renderer.ids(rollout.prompt)


def _end_masses(parts: Parts, ended: Sequence[Rollout]) -> dict[str, dict[str, float]]:
    """Model → stop id → mean probability at the end of a few finished responses; nothing where there is only
    one stop, or no response ended."""
    some, stops = ended[:_ENDS], sorted(parts.stops.ids)
    if not some or len(stops) < 2:
        return {}
    engines = {"student": parts.generators.student}
    if parts.models.teacher.gives_scores and not parts.config.method.self_taught:
        engines |= {teacher_option(n): parts.generators.teacher.of(n) for n in parts.models.teacher.names}
    contexts = [r.prefix(len(r.ids) - 1) for r in some for _ in stops]
    asked = [(i,) for _ in some for i in stops]
    masses: dict[str, dict[str, float]] = {}
    for side, engine in engines.items():
        logprobs = [row[0] for row in engine.score(contexts, asked)]
        masses[side] = {
            str(stop): sum(map(math.exp, logprobs[at :: len(stops)])) / len(some)
            for at, stop in enumerate(stops)
        }
    return masses


def _final_weight(parts: Parts, trajectory: Trajectory) -> float:
    """Weight of the last response token as the loss receives it."""
    return float(collate([trajectory], device=parts.models.device).weight_N[-1])


def _turn_end(renderer: Renderer, stops: frozenset[int]) -> str:
    """The special token with which the chat template closes an answer, if no response ends with it."""
    special = renderer.turn_end()
    return "" if not special or stops & set(special) else str(renderer.tokenizer.decode([special[0]]))


def _gradient(parts: Parts, batch: Batch, teacher: TeacherScores) -> list[Tensor]:
    """Of all trained weights; of sharded ones a mean over the processes, which all look at this batch."""
    was_training = parts.models.student.training
    parts.models.student.train(parts.models.dropout)
    parts.models.student.zero_grad(set_to_none=True)
    denominator = max(1.0, float(batch.counted_N.sum()))
    step = Step(prepared=unread(), objective=parts.objective, denominator=denominator)
    loss_of(parts.models, batch, teacher, step).loss.backward()
    give_back(parts.models.student, *parts.models.teacher.models)
    trained = [p for p in parts.models.student.parameters() if p.requires_grad]
    many = distributed.world() if sharded(parts.models.student) else 1
    found = [torch.zeros_like(p).float() if p.grad is None else p.grad.float() / many for p in trained]
    parts.models.student.zero_grad(set_to_none=True)
    parts.models.student.train(was_training)
    return found


def _norm(gradient: Sequence[Tensor]) -> float:
    """Of all tensors together."""
    return float(full(torch.nn.utils.get_total_norm(gradient)))
