"""Local correction: a prefix at a fork stands still, a copy of the student is updated on it a few times, and
its near future is written again: how far is it from the teacher's then? (arXiv 2606.00305, after 5 updates:
0.538 → 0.350 with OPD, 0.204 with TOPD.)

Each update samples continuations of the prefix from the copy as it is, and trains on them with OPD's loss, or
with OPD's loss and the guidance of the one fork that starts them. Distances are measured with the starting
student's embeddings, from the same teacher's window.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onpath.commands.picture import picture
from onpath.commands.probes.base import checked, sampled, store
from onpath.commands.probes.futures import options_of
from onpath.config.methods.topd import TOPDOptions
from onpath.data.batch import collate, micro_batches
from onpath.engines.forward import forward
from onpath.evaluate.stats import bootstrap_interval, difference_interval
from onpath.methods import Prepared
from onpath.methods.base import own_response
from onpath.methods.topd import guide
from onpath.methods.topd.candidates import Fork, ranked_by, spaced
from onpath.methods.topd.futures import with_windows
from onpath.methods.topd.guide import guidance_plans
from onpath.methods.topd.pairs import with_distances
from onpath.records import Rollout, Trajectory, token_count
from onpath.run.loss import Step, loss_of
from onpath.run.parts import Parts

ARMS = ("opd", "topd")


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """One prefix: mean distance of sampled near futures to the teacher's, before and after the updates."""

    prompt_id: str
    position: int
    loss: float
    prefix_text: str
    teacher_text: str
    before: float
    opd: float
    topd: float
    before_text: str
    """The first of the sampled futures; likewise after either arm."""
    opd_text: str
    topd_text: str


def run_probe(
    parts: Parts,
    *,
    prefixes: int,
    out: Path,
    updates: int = 5,
    samples: int = 8,
    lr: float | None = None,
    window: int | None = None,
) -> Path:
    """Writes `out/local_correction.jsonl` (a line per prefix), its summary (.json) and the picture (.png).

    Args:
        prefixes: forks of the largest divergence, one of a rollout, from twice as many rollouts.
        updates: M, of AdamW at a constant rate.
        samples: continuations per update, and per measurement.
        lr: None: a tenth of the config's, since every update is about one prefix.
        window: K; None: the method's, if it is TOPD, else 24.

    Returns:
        The path of the JSON lines.

    Raises:
        UserError: a number below 1, or a disk that cannot be written.
    """
    checked(prefixes=prefixes, updates=updates, samples=samples)
    rate = parts.config.optim.lr / 10 if lr is None else lr
    options = options_of(parts, window)
    found = [
        _correct(parts, rollout, fork, options, updates=updates, samples=samples, lr=rate)
        for rollout, fork in worst_forks(parts, prefixes, options)
    ]
    summary = {
        "student": parts.config.student.model,
        "updates": updates,
        "samples": samples,
        "lr": rate,
        "window": options.window,
        **summarise(found),
    }
    return store(out / "local_correction.jsonl", map(vars, found), summary, lambda path: draw(found, path))


def worst_forks(parts: Parts, count: int, options: TOPDOptions) -> list[tuple[Rollout, Fork]]:
    """The loudest token of each of some rollouts; of those the ones whose futures are the farthest apart."""
    made = sampled(parts, 2 * count)
    found: list[Fork] = []
    for one in forward(parts.models, [own_response(r) for r in made], past=True):
        here = []
        for row, values in one.by_place():
            losses, gaps = ranked_by(values, options)
            order = sorted(range(len(losses)), key=lambda u: -losses[u])
            (u,) = spaced(order, count=1, min_gap=1)
            here.append(Fork(row=row, position=u, loss=losses[u], gap=gaps[u], draw=0.0))
        found += with_windows(here, made, parts.tools, options, 0, one)
    measured = with_distances(found, made, parts.tools, options)
    worst = sorted(measured, key=lambda f: (-f.distance, f.row))[:count]
    return [(made[f.row], f) for f in worst]


def _correct(
    parts: Parts,
    rollout: Rollout,
    fork: Fork,
    options: TOPDOptions,
    *,
    updates: int,
    samples: int,
    lr: float,
) -> Corrected:
    prefix = rollout.context + rollout.ids[: fork.position]
    before = _futures(parts, parts.models.student, rollout, prefix, options, samples, draw=-1)
    futures = {"before": before}
    for arm in ARMS:
        student = copy.deepcopy(parts.models.student)
        _update(parts, student, rollout, prefix, fork, options, arm, updates=updates, samples=samples, lr=lr)
        futures[arm] = _futures(parts, student, rollout, prefix, options, samples, draw=-1)
    before_d, opd_d, topd_d = (_distance(parts, made, fork, options) for made in futures.values())
    text = parts.text.renderer.text
    return Corrected(
        prompt_id=rollout.prompt.id,
        position=fork.position,
        loss=fork.loss,
        prefix_text=text(prefix),
        teacher_text=text(fork.teacher),
        before=before_d,
        opd=opd_d,
        topd=topd_d,
        before_text=text(before[0].ids),
        opd_text=text(futures["opd"][0].ids),
        topd_text=text(futures["topd"][0].ids),
    )


def _futures(
    parts: Parts,
    student: torch.nn.Module,
    rollout: Rollout,
    prefix: tuple[int, ...],
    options: TOPDOptions,
    samples: int,
    *,
    draw: int,
) -> list[Rollout]:
    """Sampled near futures of the prefix, as rollouts whose context it is. `draw` −1 is for measuring."""
    copied = parts.generators.over(student)
    sampling = replace(parts.sampling, max_new_tokens=options.window)
    keys = [f"local correction/{draw}/{rollout.prompt.id}/{i}" for i in range(samples)]
    return [
        Rollout(
            prompt=rollout.prompt, sample=i, context=prefix, ids=c.ids, logprobs=c.logprobs,
            finish_reason=c.finish_reason, policy_version=0, sampling=sampling,
        )
        for i, c in enumerate(copied.continue_from([prefix] * samples, sampling, keys=keys))
    ]  # fmt: skip


def _at_start(made: Sequence[Rollout], fork: Fork, options: TOPDOptions) -> list[Fork]:
    """The fork at the first token of each continuation, with the same teacher's window."""
    return [
        replace(fork, row=row, position=0, student=r.ids[: options.window], decision="fork")
        for row, r in enumerate(made)
    ]


def _distance(parts: Parts, made: Sequence[Rollout], fork: Fork, options: TOPDOptions) -> float:
    found = with_distances(_at_start(made, fork, options), made, parts.tools, options)
    return float(np.mean([f.distance for f in found]))


def _update(
    parts: Parts,
    student: torch.nn.Module,
    rollout: Rollout,
    prefix: tuple[int, ...],
    fork: Fork,
    options: TOPDOptions,
    arm: str,
    *,
    updates: int,
    samples: int,
    lr: float,
) -> None:
    """Trains `student` in place."""
    guided = options.model_copy(update={"guide": arm == "topd"})
    mine = replace(
        parts,
        models=replace(parts.models, student=student),
        config=parts.config.model_copy(update={"method": guided}),
    )
    optim = parts.config.optim
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    weight = 1.0 if options.guidance_weight == "auto" else options.guidance_weight
    for update in range(updates):
        made = _futures(mine, student, rollout, prefix, options, samples, draw=update)
        trajectories = [own_response(r) for r in made]
        if arm == "topd":
            trajectories = _guided(mine, trajectories, made, fork, options, update)
        step = Step(
            prepared=Prepared(trajectories=trajectories, guidance_weight=weight),
            objective=parts.objective,
            denominator=token_count(trajectories),
            guided=arm == "topd",
        )
        device = parts.models.device
        for micro in micro_batches(trajectories, max_tokens=optim.micro_batch_tokens, device=device):
            batch = collate(micro, device=device)
            loss_of(mine.models, batch, mine.models.teacher.scores(batch), step).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _guided(
    parts: Parts,
    trajectories: Sequence[Trajectory],
    made: Sequence[Rollout],
    fork: Fork,
    options: TOPDOptions,
    step: int,
) -> list[Trajectory]:
    real = _at_start(made, fork, options)
    plans = guidance_plans(real, made, parts.tools, options, step)
    return guide.annotated(trajectories, real, real, plans, options, parts.text.renderer.tokens)


def summarise(found: Sequence[Corrected]) -> dict[str, Any]:
    """Means with intervals over prefixes, and OPD's distance minus TOPD's, paired."""
    columns = {name: [getattr(c, name) for c in found] for name in ("before", *ARMS)}
    differences = [(c.opd - c.topd) / 2 for c in found]  # D lies in [0, 2]
    return {
        "prefixes": len(found),
        **{
            name: {"mean": float(np.mean(v)), "ci95": [2 * x for x in bootstrap_interval([d / 2 for d in v])]}
            for name, v in columns.items()
        },
        "opd_minus_topd": {
            "mean": 2 * float(np.mean(differences)),
            "ci95": [2 * x for x in difference_interval(differences)],
        },
        "topd_nearer": sum(d > 0 for d in differences),
        "opd_nearer": sum(d < 0 for d in differences),
    }


def draw(found: Sequence[Corrected], path: Path) -> None:
    """One line per prefix: before, after OPD, after TOPD."""
    names = ("opd", "before", "topd")
    means = [float(np.mean([getattr(c, n) for c in found])) for n in names]
    with picture(path, size=(5, 4)) as (_, (axis,)):
        for c in found:
            axis.plot(range(3), [getattr(c, n) for n in names], color="0.75", linewidth=0.8)
        axis.plot(
            range(3), means, color="#D55E00", linewidth=2, marker="o", label=f"mean of {len(found)} prefixes"
        )
        axis.set(
            xticks=range(3), xticklabels=("after OPD", "before", "after TOPD"), ylabel="D to the teacher"
        )
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
