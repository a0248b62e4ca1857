"""Checks of who scores: engine against trainer, teacher against itself, teacher against student.

Shape suffixes: N response tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onpath.commands.doctor.finding import Finding, skipped
from onpath.commands.doctor.sample import (
    Probe,
    agreed,
    as_they_are,
    batches_of,
    divergence,
    logp_of,
    narrow,
    own_scores,
    rows_of,
    teacher_scores,
    teachers_whole,
    trainer_stats,
)
from onpath.config.sections import Teacher as TeacherSection
from onpath.config.sections import teacher_option
from onpath.data.batch import Batch, collate
from onpath.engines import sharding
from onpath.engines.head import hidden_states, width_of
from onpath.engines.models import load_model
from onpath.engines.routed import by_teacher
from onpath.engines.teacher import ModelTeacher
from onpath.losses import TeacherHidden, TeacherMixture, TeacherScores, TeacherTopK, token_stats
from onpath.records import Rollout, Sampling, Trajectory
from onpath.run.log import says_overlap
from onpath.run.parts import Parts

_COMPARED = 8
"""Responses whose scores are compared one by one."""
_GAP = {False: (1e-4, 1e-3), True: (0.03, 0.1)}
"""Half precision or not → mean gap of log-probs, nats, above which a check warns and fails."""
_SELF_KL = {False: 1e-5, True: 1e-2}
"""Half precision or not → mean KL of a teacher to itself, nats, above which a check fails."""
_SAME_KL = {False: 1e-6, True: 1e-4}
"""Half precision or not → mean KL of student and teacher, nats, below which they are one model."""
_STIR = 0.05
"""Noise on the weights, in standard deviations of each tensor, doubled until the log-probs have moved."""
_MOVED = 0.3
"""Nats a token: more than half precision blurs."""
_STIRS = 8
_Z = (3.0, 4.5)
"""Standard errors of the mean surprise above which a check warns and fails."""


def engine_logprobs(parts: Parts, rollouts: Sequence[Rollout]) -> Finding:
    """Log-probs of the engine = log-probs of the forward pass that trains, on the same ids.

    Compared are those that came with the samples, where nothing truncates or tempers them, and those of the
    engine's own scoring.
    """
    trajectories = as_they_are(rollouts)[:_COMPARED]
    expected = student_logps(parts, trajectories)
    scored = parts.generators.student.score(
        [t.student_context for t in trajectories], [t.response for t in trajectories]
    )
    scoring = _gaps(scored, expected)
    gaps, what = scoring, "scored"
    if parts.sampling.untruncated:
        sampled = _gaps([t.origin.logprobs for t in trajectories if t.origin], expected)
        gaps, what = [*sampled, *scoring], "sampled and scored"
    warn, fail = _GAP[narrow(parts)]
    mean, most = _mean(gaps), max(gaps)
    values = {"mean_gap_nats": mean, "max_gap_nats": most, "tokens": len(scoring)}
    message = (
        f"engine and trainer differ by {mean:.1e} nats on average, {most:.1e} at most, on {len(scoring):,} "
        f"{what} tokens"
    )
    advice = (
        "the engine has other weights, other ids (BOS, template), another dtype or another temperature than "
        "the trainer"
    )
    status = "fail" if not mean <= fail else "warning" if mean > warn else "ok"
    return Finding(
        name="engine_logprobs",
        status=status,  # type: ignore[arg-type]
        message=message,
        advice="" if status == "ok" else advice,
        values=values,
    )


def engine_follows(parts: Parts) -> Finding:
    """After `sync_weights` the engine scores with the new weights: they are stirred, and later put back.

    Call it within `sample.untouched`.
    """
    sampling = replace(parts.sampling, max_new_tokens=16)
    with parts.whole():
        rollout = agreed(parts.generators.student.generate(parts.prompts.pool[:4], sampling))
    trajectories = as_they_are(rollout)
    before, after, moved = student_logps(parts, trajectories), [], 0.0
    for seed in range(_STIRS):
        stir(parts, share=_STIR * 2**seed, seed=seed)
        after = student_logps(parts, trajectories)
        moved = _mean(_gaps(before, after))
        if moved > _MOVED:
            break
    parts.generators.student.sync_weights(1)
    scored = parts.generators.student.score(
        [t.student_context for t in trajectories], [t.response for t in trajectories]
    )
    gap = _mean(_gaps(scored, after))
    with parts.whole():
        one = parts.generators.student.generate(parts.prompts.pool[:1], replace(sampling, max_new_tokens=1))
    version = one[0].policy_version
    values = {"moved_nats": moved, "gap_nats": gap, "policy_version": version}
    message = f"weights moved by {moved:.2g} nats a token; after sync the engine is {gap:.1e} nats from them"
    if not gap < 0.2 * moved:
        advice = "the engine samples from stale weights: sync_weights does not reach it"
        return Finding(name="engine_follows", status="fail", message=message, advice=advice, values=values)
    if version != 1:
        message = f"after sync_weights(1) the engine says that its weights are version {version}"
        advice = "rollouts would carry a wrong policy_version"
        return Finding(name="engine_follows", status="fail", message=message, advice=advice, values=values)
    return Finding(name="engine_follows", status="ok", message=message, values=values)


@torch.no_grad()
def stir(parts: Parts, *, share: float, seed: int) -> None:
    """Moves every trained tensor by noise of `share` of its own spread (a LoRA matrix of zeros: of 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    sharding.give_back(parts.models.student)
    for p in parts.models.student.parameters():
        if p.requires_grad:
            spread = float(sharding.full(p).float().std()) if p.numel() > 1 else 0.0
            noise = sharding.own_rows(p, torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)
            sharding.local(p).add_(noise, alpha=share * spread if spread > 0 else 0.02)


def on_policy(parts: Parts, rollouts: Sequence[Rollout]) -> Finding:
    """Are the samples drawn from the student's own distribution, whatever the engine says of them?

    E[−log p(y_t)] over own samples is the entropy H_t, so Σ(−log p − H) over all tokens is, in its own
    standard errors, about standard normal. Colder or truncated samples are less surprising than that.
    """
    if not parts.config.method.on_policy or not parts.sampling.untruncated:
        return skipped("on_policy", "the objective does not take the rollouts for the student's own samples")
    length = parts.sampling.max_new_tokens
    settings = {replace(r.sampling, max_new_tokens=length) for r in rollouts}
    if settings != {parts.sampling}:
        message = (
            f"asked for {parts.sampling}, the engine sampled at {next(iter(settings - {parts.sampling}))}"
        )
        return Finding(name="on_policy", status="fail", message=message, advice="mend the engine's settings")
    excess: list[float] = []
    for _, stats in trainer_stats(parts, as_they_are(rollouts)):
        assert stats.student_logp is not None
        excess += (-stats.student_logp - stats.student_entropy).tolist()
    spread = math.sqrt(sum(e * e for e in excess))
    z, mean = (sum(excess) / spread if spread else 0.0), sum(excess) / len(excess)
    values = {"surprise_minus_entropy_nats": mean, "standard_errors": z, "tokens": len(excess)}
    message = (
        f"samples are {mean:+.3f} nats a token from the entropy that own samples have: {z:+.1f} standard "
        f"errors, {len(excess):,} tokens"
    )
    warn, fail = _Z
    if abs(z) <= warn:
        return Finding(name="on_policy", status="ok", message=message, values=values)
    how = "colder than temperature 1, or truncated" if z < 0 else "hotter than temperature 1"
    return Finding(
        name="on_policy",
        status="fail" if abs(z) > fail else "warning",
        message=message,
        advice=f"the samples look {how}: does the engine take temperature, top-p and top-k from the request?",
        values=values,
    )


def teacher_itself(parts: Parts, probe: Probe) -> Finding:
    """The teacher scored against itself gives KL 0: read together and alone, and by the student's path."""
    worst, total, count = 0.0, 0.0, 0
    trajectories = [
        replace(t, student_context=t.teacher_context, guidance=()) for t in probe.trajectories[:_COMPARED]
    ]
    for batch in batches_of(parts, trajectories):
        together = teacher_scores(parts, batch)
        kl_N = torch.cat(
            [distance(teacher_scores(parts, alone), part) for alone, part in _apart(parts, batch, together)]
        )
        teacher = parts.models.teacher.of(batch.teacher)
        # The head of a teacher that is lost behind errors is of two models' states: they have no such path.
        head, model = teacher.head, teacher.model
        if head is not None and model is not None and head.weight.shape[1] == width_of(model):
            own = own_scores(_by_students_path(parts, batch), head)
            kl_N = torch.maximum(kl_N, distance(own, together))
        worst, total, count = max(worst, float(kl_N.max())), total + float(kl_N.sum()), count + len(kl_N)
    mean = total / count
    values = {"mean_kl_nats": mean, "max_kl_nats": worst, "tokens": count}
    message = f"teacher against itself: KL {mean:.1e} nats a token, {worst:.1e} at most"
    if mean <= _SELF_KL[narrow(parts)]:
        return Finding(name="teacher_itself", status="ok", message=message, values=values)
    advice = "its scores depend on padding or batching, or are of other positions than the response's"
    return Finding(name="teacher_itself", status="fail", message=message, advice=advice, values=values)


def alignment(parts: Parts, probe: Probe) -> Finding:
    """What is generated in the teacher's name it must score alike: at the same position, not beside it."""
    some = probe.trajectories[:_COMPARED]
    if not all(parts.generators.teacher.of(t.teacher).generates for t in some):
        return skipped("alignment", "a mixture of teachers writes nothing")
    left = parts.models.teacher.context_length - max(len(t.teacher_context) for t in some)
    sampling = Sampling(max_new_tokens=max(2, min(32, left)), seed=parts.config.run.seed)
    contexts = [t.teacher_context for t in some]
    keys = [f"doctor/{i}" for i in range(len(some))]
    with parts.whole(), parts.models.teacher.acting():
        if not teachers_whole(parts):
            return skipped("alignment", "the teacher stays in its shards, and writes nothing")
        generated = by_teacher(
            [t.teacher for t in some],
            lambda name, mine: parts.generators.teacher.of(name).continue_from(
                [contexts[i] for i in mine], sampling, keys=[keys[i] for i in mine]
            ),
        )
    generated = agreed(generated)
    if any(not c.logprobs or math.isnan(sum(c.logprobs)) for c in generated):
        return skipped("alignment", "the teacher's generator gives no log-probs")
    trajectories = [
        Trajectory(student_context=c, teacher_context=c, response=g.ids, place=place, origin=t.origin)
        for place, (t, c, g) in enumerate(zip(some, contexts, generated, strict=True))
    ]
    gaps: dict[int, list[float]] = {-1: [], 0: [], 1: []}
    for batch in batches_of(parts, trajectories):
        scores = teacher_scores(parts, batch)
        own_N = torch.tensor(
            [p for place in batch.places for p in generated[place].logprobs], device=parts.models.device
        )
        for offset, found in gaps.items():
            found += _shifted_gaps(scores, batch.token_N, batch.row_N, own_N, offset)
    mean = {offset: _mean(g) for offset, g in gaps.items()}
    best = min(mean, key=lambda offset: mean[offset])
    values = {
        "gap_nats": mean[0],
        "gap_one_early_nats": mean[-1],
        "gap_one_late_nats": mean[1],
        "tokens": len(gaps[0]),
    }
    message = (
        f"the teacher scores what it wrote within {mean[0]:.1e} nats; shifted by one the gap would be "
        f"{min(mean[-1], mean[1]):.2g}"
    )
    if mean[0] <= _GAP[narrow(parts)][1] and best == 0:
        return Finding(name="alignment", status="ok", message=message, values=values)
    advice = "the teacher that scores is not the one that writes, or reads other ids"
    if best != 0:
        advice = f"its scores are shifted by {best:+d}: score t must be that of token t given those before it"
    return Finding(name="alignment", status="fail", message=message, advice=advice, values=values)


def teacher_differs(parts: Parts, probe: Probe) -> Finding:
    """A teacher that is the student (or a hint that changes nothing) has nothing to teach."""
    kls: list[float] = []
    logps: list[float] = []
    shares: list[float] = []
    for batch in probe.batches(parts):
        stats = divergence(parts, batch)
        shares += [] if stats.overlap is None else stats.overlap.tolist()
        assert stats.reverse_kl is not None
        kls += stats.reverse_kl.tolist()
        logps += [] if stats.teacher_logp is None else stats.teacher_logp.tolist()
    kl, logp, uniform = _mean(kls), _mean(logps), -math.log(parts.models.vocabulary)
    values = {"reverse_kl_nats": kl, "teacher_logp_nats": logp, "tokens": len(kls)}
    message = f"KL(student ‖ teacher) is {kl:.2g} nats a token on {len(kls):,} tokens"
    section = parts.config.taught_by.get(probe.trajectories[0].teacher)  # a mixture has none
    if section is not None and section.quantization is not None:
        values["quantised_kl_nats"] = _quantised_kl(parts, probe, section)
        message += f"; quantising moves the teacher by {values['quantised_kl_nats']:.2g} nats a token"
    if shares:
        values["top_overlap"] = _mean(shares)
        message += f"; {says_overlap(values['top_overlap'])}"
    if not kl > _SAME_KL[narrow(parts)]:
        status = "fail" if parts.objective.needs_teacher else "warning"
        return Finding(
            name="teacher_differs",
            status=status,  # type: ignore[arg-type]
            message=message + ": they are the same",
            advice="choose another teacher.model (or a privileged prompt that changes what the teacher says)",
            values=values,
        )
    if logp < uniform:
        message += f"; it gives these tokens {logp:.1f} nats each, less than chance ({uniform:.1f})"
        advice = "look at template and tokenizer: the teacher may not know this format"
        return Finding(
            name="teacher_differs", status="warning", message=message, advice=advice, values=values
        )
    return Finding(name="teacher_differs", status="ok", message=message, values=values)


def _quantised_kl(parts: Parts, probe: Probe, section: TeacherSection) -> float:
    """KL(teacher as it is ‖ teacher quantised), nats a token, along the probe's responses."""
    name = probe.trajectories[0].teacher
    model = parts.models.teacher.of(name).model
    assert model is not None
    plain = section.model_copy(update={"quantization": None})
    loaded = load_model(plain, f"{teacher_option(name)}.model", next(model.parameters()).device)
    whole = ModelTeacher(loaded, vocabulary=parts.models.vocabulary)
    found: list[float] = []
    for batch in probe.batches(parts):
        found += distance(whole.scores(batch), teacher_scores(parts, batch)).tolist()
    return _mean(found)


def student_logps(parts: Parts, trajectories: Sequence[Trajectory]) -> list[list[float]]:
    found: dict[int, list[float]] = {}
    placed = [replace(t, place=place) for place, t in enumerate(trajectories)]
    for batch, stats in trainer_stats(parts, placed):
        assert stats.student_logp is not None
        found |= dict(zip(batch.places, batch.by_row(stats.student_logp), strict=True))
    return [found[place] for place in range(len(trajectories))]


def _gaps(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> list[float]:
    """|difference| of each token; a log-prob that is missing or no number counts as infinitely far."""
    gaps: list[float] = []
    for a, b in zip(found, expected, strict=True):
        pairs = zip(a, b, strict=False)
        gaps += [d if not math.isnan(d) else math.inf for d in (abs(x - y) for x, y in pairs)]
        gaps += [math.inf] * abs(len(a) - len(b))
    return gaps


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def distance(one: TeacherScores, two: TeacherScores) -> Tensor:
    """KL [N] of two readings; of served ones the largest difference of a log-prob that both name."""
    if isinstance(one, TeacherHidden) and isinstance(two, TeacherHidden):
        stats = token_stats(student_hidden=one.hidden, student_head=one.head, teacher=two)
        assert stats.reverse_kl is not None
        return stats.reverse_kl
    if isinstance(one, TeacherMixture) and isinstance(two, TeacherMixture):
        pairs = zip(one.members, two.members, strict=True)  # KL of mixtures is at most the mixture's of KLs
        return torch.stack([w * distance(*pair) for w, pair in zip(one.weights, pairs, strict=True)]).sum(0)
    assert isinstance(one, TeacherTopK)
    assert isinstance(two, TeacherTopK)
    both = one.ids[:, :, None] == two.ids[:, None, :]
    gaps = (one.logp[:, :, None] - two.logp[:, None, :]).abs()
    return gaps.masked_fill(~both, 0.0).amax((1, 2))


def _apart(parts: Parts, batch: Batch, scores: TeacherScores) -> Iterator[tuple[Batch, TeacherScores]]:
    """Each trajectory as a batch of its own, with its rows of the common reading."""
    for row, trajectory in enumerate(batch.trajectories):
        yield collate([trajectory], device=parts.models.device), rows_of(scores, batch.row_N == row)


def _by_students_path(parts: Parts, batch: Batch) -> Tensor:
    """The teacher's hidden states as training reads the student's, on the student's side of the batch."""
    teacher = parts.models.teacher.of(batch.teacher)
    model = teacher.model
    assert model is not None, "only a teacher in this process has hidden states"
    with torch.no_grad(), teacher.acting():
        device = next(model.parameters()).device
        moved = batch.to(device)
        hidden_BSH = hidden_states(model, moved.student_ids_BS)
    return moved.at_student(hidden_BSH).to(batch.token_N.device)


def _shifted_gaps(
    scores: TeacherScores, token_N: Tensor, row_N: Tensor, own_N: Tensor, offset: int
) -> list[float]:
    """|score − log-prob as written| where the score is taken `offset` positions later in the same row. Of a
    token outside a served set only a bound is known: the gap is by how much it was likelier than that."""
    here = torch.arange(len(token_N), device=token_N.device)
    there = here + offset
    inside = (there >= 0) & (there < len(token_N))
    here, there = here[inside], there[inside]
    same = row_N[here] == row_N[there]
    here, there = here[same], there[same]
    rows, token, own = rows_of(scores, there), token_N[here], own_N[here]
    if not isinstance(rows, TeacherTopK):
        return (logp_of(rows, token) - own).abs().tolist()
    if offset == 0 and rows.sampled_logp is not None:
        return (rows.sampled_logp - own).abs().tolist()
    gap, served = own - logp_of(rows, token), (rows.ids == token[:, None]).any(-1)
    return torch.where(served, gap.abs(), gap.clamp_min(0.0)).tolist()
