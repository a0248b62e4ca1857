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

    def rank(self, rollout, step):
        match self.options.keep:
            case "longer":
                return -len(rollout.ids)
            case "shorter":
                return len(rollout.ids)
        return random.Random(f"{self.tools.sampling.seed} {step} {rollout.key}").random()

    def prepare(self, rollouts, *, step):
        everyone = sorted(self.tools.gather([(self.rank(r, step), r.key) for r in rollouts]))
        kept = {key for _, key in everyone[: len(everyone) // 2]}  # of all processes' rollouts
        mine = [len(r.ids) for r in rollouts if r.key in kept]
        out = Edit(kind="none", kept=False, reason=f"not in the {self.options.keep} half")
        made = [own_response(r) for r in rollouts]
        return Prepared(
            trajectories=[t if t.origin.key in kept else replace(t, edit=out) for t in made],
            means={"kept_length": (sum(mine), len(mine))},
        )
