"""Bridge: TOPD finds the place, the teacher writes until the near futures meet again, the student goes on
(ours, after FutureBridge, arXiv 2608.01953).

    y ~ p_S(·|x);   t = the first place of y where the near futures part: D_t ≥ `distance` (TOPD)
    T = K tokens of the teacher after y_<t, greedy
    n = the first multiple of `every` at which the futures have met: transport distance of the student's next
        M tokens after y_<t T_<n (greedy) and T_n … T_{n+M−1} ≤ `meet_distance`;   n = |T| where they never do
    z = y_<t T_<n s,   s ~ p_S(·|x, y_<t T_<n);   L = Σ KL(p_S ‖ p_T) / Σ 1 along z, or y if z is not better

z is better if it is right and y was not, or, both being alike, if the teacher finds s, the student's words
behind the bridge, likelier per token than y_t …, those behind the fork. The models decode one after the
other, a bridge as one window. Deviations: we know the paper's idea, not its numbers, so all of them, the test
of meeting and the measure of what is better are ours; only rollouts that are not right are bridged.
Controls: `control: own_token`, `control: random_place`; and `opd`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from statistics import fmean

from onpath.config.methods.bridge import BridgeOptions
from onpath.engines.forward import Kept, per_token
from onpath.methods.base import Method, Prepared, own_response
from onpath.methods.mixed import Cost, Mixed, goes_on_for, inserted, student_goes_on, trained_on
from onpath.methods.places import by_lot, first_forks
from onpath.methods.topd.pairs import of_tokens
from onpath.records import Rollout

Ids = tuple[int, ...]


class Bridge(Method):
    """Keeps the student's prefix, and has the teacher repair what comes next."""

    Options = BridgeOptions
    options: BridgeOptions

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        kept, cost, when, options = Kept(), Cost(), f"step {step}", self.options
        look = partial(first_forks, window=options.window, distance=options.distance)
        forks = look(rollouts, self.tools, keep=kept, step=step)
        cost.teacher += sum(f.teacher_tokens for f in forks)
        right = self.tools.text.right([(r, r.ids) for r in rollouts])
        wanted = {
            i: f.position
            for i, (f, ok) in enumerate(zip(forks, right, strict=True))
            if f.position is not None and (ok is not True or not options.failed_only)
        }
        windows = {i: forks[i].teacher_window for i in wanted}
        if options.control == "random_place":
            seed, size = self.tools.sampling.seed, {i: len(rollouts[i].ids) for i in wanted}
            wanted = {i: by_lot(seed, f"{when}/{rollouts[i].key}/place", n) for i, n in size.items()}
            windows = self.teacher_windows(rollouts, wanted, cost, when)
        made = [Mixed.of(r) for r in rollouts]
        lengths = self.meetings(rollouts, wanted, windows, cost)
        for i, at in wanted.items():
            bridge = () if options.control == "own_token" else windows[i][: lengths[i]]
            made[i] = made[i].cut(at).then(inserted(bridge, self.tools), "teacher")
        made = student_goes_on(made, self.tools, cost, [f"{when}/{r.key}/bridge" for r in rollouts])
        if options.keep == "better":
            made = self.better(made, right, kept)
        return trained_on(made, self.tools, cost, kept, kind="bridge")

    def teacher_windows(
        self, rollouts: Sequence[Rollout], places: dict[int, int], cost: Cost, when: str
    ) -> dict[int, Ids]:
        """K greedy tokens of the teacher's after each place."""
        sampling = replace(self.tools.sampling, temperature=0.0, max_new_tokens=self.options.window)
        keys = [f"{when}/{rollouts[i].key}/window" for i in places]
        done = goes_on_for(rollouts, list(places.items()), "teacher", self.tools, cost, sampling, keys)
        return {i: c.ids for i, c in zip(places, done, strict=True)}

    def meetings(
        self, rollouts: Sequence[Rollout], places: dict[int, int], windows: dict[int, Ids], cost: Cost
    ) -> dict[int, int]:
        """Tokens of each bridge: up to where the student's near future is the teacher's again."""
        models, size, every = self.tools.models, self.options.meet_window, self.options.every
        tries = [(i, n) for i, w in windows.items() for n in range(every, len(w) - size + 1, every)]
        lengths = {i: len(w) for i, w in windows.items()}
        if not tries or self.options.control == "own_token":
            return lengths
        sampling = replace(self.tools.sampling, temperature=0.0, max_new_tokens=size)
        prefixes = [rollouts[i].prefix(places[i]) + windows[i][:n] for i, n in tries]
        keys = [f"{i}/{n}" for i, n in tries]  # greedy: no draw depends on them
        ahead = self.tools.generators.student.continue_from(prefixes, sampling, keys=keys)
        cost.student += sum(len(c.ids) for c in ahead)
        theirs = [windows[i][n : n + size] for i, n in tries]
        pairs = of_tokens([c.ids for c in ahead], theirs, models.student, models.device)
        far, _ = pairs.transport(epsilon=None)
        for (i, n), distance in reversed(list(zip(tries, far.tolist(), strict=True))):
            lengths[i] = n if distance <= self.options.meet_distance else lengths[i]
        return lengths

    def better(self, made: Sequence[Mixed], right: Sequence[bool | None], kept: Kept) -> list[Mixed]:
        """Bridged responses that are better than the rollout, else the rollout."""
        new = [i for i, m in enumerate(made) if m.changed]
        verdicts = self.tools.text.right([(made[i].y, made[i].z.ids) for i in new])
        both = [own_response(r) for i in new for r in (made[i].z, made[i].y)]
        values = per_token(self.tools.models, both, keep=kept)
        found = list(made)
        for n, (i, ok) in enumerate(zip(new, verdicts, strict=True)):
            at, logps = made[i].places[0], [v.get("teacher_logp", []) for v in values[2 * n : 2 * n + 2]]
            begins = len(logps[0]) - made[i].writers[at:].count("student"), at
            after, before = (fmean(v[t:] or [-inf]) for v, t in zip(logps, begins, strict=True))
            if (ok is True, after) <= (right[i] is True, before):
                found[i] = Mixed.of(made[i].y)
        return found
