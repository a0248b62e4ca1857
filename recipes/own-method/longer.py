"""A method of one's own: train on half of the rollouts, by their length. onpath's package is not touched."""

import random
from dataclasses import replace
from typing import Literal

from onpath.methods import Edit, Method, MethodOptions, Prepared, own_response


class Half(Method):
    """Keeps half of each step's rollouts; the others are recorded, and not trained on."""

    class Options(MethodOptions):
        keep: Literal["longer", "shorter", "random"] = "longer"
        """Which half; random is the control."""

    def prepare(self, rollouts, *, step):
        lots = random.Random(f"{self.tools.sampling.seed} {step}")
        rank = {
            "longer": lambda r: -len(r.ids),
            "shorter": lambda r: len(r.ids),
            "random": lambda r: lots.random(),
        }[self.options.keep]
        kept = {r.place for r in sorted(rollouts, key=rank)[: len(rollouts) // 2]}
        out = Edit(kind="none", kept=False, reason=f"not in the {self.options.keep} half")
        made = [own_response(r) for r in rollouts]
        return Prepared(
            trajectories=[t if t.origin.place in kept else replace(t, edit=out) for t in made],
            means={"kept_length": (sum(len(r.ids) for r in rollouts if r.place in kept), len(kept))},
        )
