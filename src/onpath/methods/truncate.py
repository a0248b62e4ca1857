"""Truncate: OPD up to the first place from which a rollout cannot be saved.

    y ~ p_S(·|x);   n = the place that `stop_when` finds in y;   L = Σ_{t<n} w_t·KL(p_S ‖ p_T) / Σ_{t<n} 1
    overlap   Prune-OPD (arXiv 2605.07804): a window whose mean |top-k_S ∩ top-k_T| / k is below
              `overlap_below` has drifted; each one scales w of all later tokens by `decay`, until
              w < `least_weight` ends it
    low_kl    KAT (arXiv 2606.09471): `patience` windows in a row whose mean KL is below a threshold that
              follows the training; it ends where they begin
    fork      the first place where near futures part (TOPD, arXiv 2606.00305)
    checker   behind the first wrong token;   share   the first share of the tokens (arXiv 2605.28396)

The two signals are opposite: of a lost prefix Prune-OPD expects disagreement, KAT agreement.
Deviations: rollouts are generated to their end and cut before the loss, so no generation is saved; windows
follow each other and do not slide; all numbers are ours (the abstracts give none); KAT's threshold is a
moving quantile of the windows' means. A first window is never cut.
Controls: `control: random_place`; and `opd`, which cuts nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from onpath.config.methods.truncate import TruncateOptions
from onpath.engines.forward import Kept, per_token
from onpath.methods.base import Method, Prepared, own_response
from onpath.methods.places import by_lot, first_forks, first_run, moved, window_means
from onpath.methods.tools import Tools
from onpath.records import Edit, Rollout, Trajectory

_ROUNDING = 1e-6
"""Of an overlap, a share in float32: a window that stands at `overlap_below` is not below it."""


class Truncate(Method):
    """Leaves out what stands behind a place."""

    Options = TruncateOptions
    options: TruncateOptions

    def __init__(self, options: TruncateOptions, tools: Tools) -> None:
        super().__init__(options, tools)
        self.threshold = torch.tensor(torch.nan, dtype=torch.float64)

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        kept, own = Kept(), [own_response(r) for r in rollouts]
        weights, generated = self.weights(rollouts, own, kept, step)
        made = []
        for r, t, mine in zip(rollouts, own, weights, strict=True):
            if self.options.control == "random_place" and len(mine) < len(r.ids):
                lot = by_lot(self.tools.sampling.seed, f"step {step}/{r.key}/truncate", len(r.ids))
                mine = (*mine, *mine[-1:] * len(r.ids))[: 1 + lot]
            edit = Edit(kind="truncate" if len(mine) < len(r.ids) else "none", detail={"whole": len(r.ids)})
            kept.truncated(t, len(mine))
            short = replace(t.truncated(len(mine)), edit=edit)
            made.append(short if set(mine) <= {1.0} else short.reweighted(mine))
        trained_on, whole = (float(sum(len(t.response) for t in of)) for of in (made, own))
        cut = float(sum(t.edit.kind != "none" for t in made)), float(len(made))
        return Prepared(
            trajectories=made,
            kept=kept,
            means={"truncated_share": cut, "token_share": (trained_on, whole)},
            totals={"teacher_tokens_generated": generated},
        )

    def weights(
        self, rollouts: Sequence[Rollout], own: Sequence[Trajectory], kept: Kept, step: int
    ) -> tuple[list[tuple[float, ...]], int]:
        """Of each rollout the weights of what is trained on; and the tokens that the teacher generated."""
        options, size = self.options, self.options.window
        whole, generated = [len(r.ids) for r in rollouts], 0
        match options.stop_when:
            case "share":
                ends = [max(min(1, n), round(options.share * n)) for n in whole]
            case "checker":
                wrong = [self.tools.text.first_wrong_token(r) for r in rollouts]
                ends = [n if at is None else at + 1 for n, at in zip(whole, wrong, strict=True)]
            case "fork":
                look = partial(first_forks, window=size, distance=options.distance, keep=kept, step=step)
                forks = look(rollouts, self.tools)
                ends = [
                    n if f.position is None else f.position + 1 for n, f in zip(whole, forks, strict=True)
                ]
                generated = sum(f.teacher_tokens for f in forks)
            case "overlap":
                values = per_token(self.tools.models, own, keep=kept, top_k=options.overlap_k)
                return [drifting(v.get("overlap", []), options) for v in values], 0
            case "low_kl":
                values = per_token(self.tools.models, own, keep=kept)
                means = [window_means(v.get("reverse_kl", []), size) for v in values]
                flat = [mean for row in means for mean in row]
                low = moved(self.threshold, flat, level=options.low_share, decay=options.quantile_decay)
                traps = [first_run(row, below=low, count=options.patience) for row in means]
                ends = [n if at is None else size * max(1, at) for n, at in zip(whole, traps, strict=True)]
        return [(1.0,) * min(n, end) for n, end in zip(whole, ends, strict=True)], generated

    def state(self) -> Mapping[str, Tensor]:
        """See `Method.state`."""
        return {"truncate.threshold": self.threshold}


def drifting(overlap: Sequence[float], options: TruncateOptions) -> tuple[float, ...]:
    """Weights that fall with each window that has drifted, up to where they are too small."""
    weight, found = 1.0, list[float]()
    for at, mean in enumerate(window_means(overlap, options.window)):
        if weight < options.least_weight:
            break
        found += [weight] * len(overlap[at * options.window :][: options.window])
        weight *= options.decay if mean < options.overlap_below - _ROUNDING else 1.0
    return tuple(found)
