"""The rollouts of a step: the same whatever the number of processes, however they are dealt to them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from onpath.data.load import prompts_of_step
from onpath.engines import sharding
from onpath.engines.base import sample_keys, unwritten
from onpath.engines.overlap import fresh
from onpath.methods.base import Method, Prepared
from onpath.records import Rollout
from onpath.run.check_prepared import check_prepared, check_rollouts
from onpath.run.meter import Meter
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.system.errors import UserError


def sample(parts: Parts, step: int) -> list[Rollout]:
    """This process's rollouts of one step: the student's own samples (rollout.overlap: of one step ago;
    rollout.refresh: of the weights that the rule says)."""

    def draw(step: int) -> list[Rollout]:
        size, n = parts.config.rollout.prompts, parts.config.rollout.n
        prompts = prompts_of_step(parts.prompts.pool, size=size, seed=parts.config.run.seed, step=step)
        # A step over the end of an epoch may hold a prompt twice: its samples are numbered through.
        seen, before = Counter[str](), list[int]()
        for prompt in prompts:
            before.append(seen[prompt.id])
            seen[prompt.id] += 1
        mine = distributed.share(list(enumerate(prompts)))
        keys, asked = [f"step {step}/{place}" for place, _ in mine], [p for _, p in mine]

        def numbered(rollouts: list[Rollout]) -> list[Rollout]:
            if not any(before):
                return rollouts
            firsts = [n * before[place] for place, _ in mine for _ in range(n)]
            return [replace(r, sample=first + r.sample) for first, r in zip(firsts, rollouts, strict=True)]

        if parts.config.method.writes_rollouts:
            student = parts.generators.student  # itself: no world puts errors into what the method writes
            blank = numbered(unwritten(student, student.renderer, asked, parts.sampling, n=n))
            return written(parts, blank, sample_keys(keys, n), step)
        return numbered(parts.sampler.generate(asked, parts.sampling, n=n, keys=keys, **scored_early(parts)))

    if parts.refreshed is not None:
        rollouts = parts.refreshed.rollouts(step)
    else:
        rollouts = draw(step) if parts.overlap is None else parts.overlap(step, draw)
    if parts.config.parallel.balance:
        together = (lambda r: r.prompt.id) if parts.method.compares_samples else None
        drawn = rollouts
        rollouts = distributed.dealt(drawn, lambda r: len(r.context) + len(r.ids), together=together)
        if scored_early(parts):
            send_on(parts, drawn, rollouts)
    rollouts = [replace(r, place=place) for place, r in enumerate(rollouts)]
    return fresh(parts.config, rollouts, step)


class NotHandedOver(UserError):
    """An engine did not take the weights of a step that is done.

    Args:
        error: what it said.
        finished: of that step.
    """

    def __init__(self, error: UserError, finished: Meter) -> None:
        super().__init__(*error.args)
        self.frames, self.finished = error.frames, finished


def hand_over(parts: Parts, meter: Meter, version: int) -> None:
    """The trained weights go to whoever generates, once the next batch is drawn (rollout.overlap).

    Raises:
        NotHandedOver: the engine does not take them. The step is done all the same.
    """
    try:
        if parts.overlap is not None:
            with meter.watch("sample"):
                parts.overlap.before_sync()
        with meter.watch("sync"):
            parts.generators.student.sync_weights(version)
            sharding.give_back(parts.models.student)
    except UserError as error:
        raise NotHandedOver(error, meter) from error


def written(parts: Parts, blank: list[Rollout], keys: list[str], step: int) -> list[Rollout]:
    """Rollouts by a method that writes them itself.

    Raises:
        UserError: it does not, or gives something else.
    """
    method = parts.method
    if type(method).write_rollouts is Method.write_rollouts:
        raise UserError(
            f"method.name {parts.config.method.name}: its options say writes_rollouts, and it has no "
            "write_rollouts(self, blank, *, keys, step)"
        )
    return check_rollouts(method.write_rollouts(blank, keys=keys, step=step), blank, parts)


def scored_early(parts: Parts) -> dict[str, Callable[[Rollout], None]]:
    """What the sampler is told, if anything: that the teacher may score a rollout while others are written.
    Not where a rollout may yet be left out."""
    left_out = any(r.at_least is not None for r in parts.config.rewards.values())
    if left_out or not parts.sampler.shows_early:
        return {}

    def finished(rollout: Rollout) -> None:
        if (trajectory := parts.method.scored_first(rollout)) is not None:
            parts.models.teacher.begin(trajectory)

    return {"finished": finished}


def send_on(parts: Parts, drawn: list[Rollout], dealt: list[Rollout]) -> None:
    """What the teacher has read of a rollout goes with it, to the process that it was dealt to.

    Args:
        drawn: by this process.
        dealt: to it.
    """
    teacher, read_of = parts.models.teacher, parts.method.scored_first
    had, has = ({(r.prompt.id, r.sample): r for r in rollouts} for rollouts in (drawn, dealt))
    asked = distributed.exchanged([[name for name in has if name not in had]] * distributed.world())
    mine = [
        [(name, t) for name in names if name in had and (t := read_of(had[name])) is not None]
        for names in asked
    ]
    # One rollout for each process at a time: on its way there are several copies of what was read of it.
    for turn in range(distributed.most(max(map(len, mine)))):
        parcels = [{name: teacher.begun(t) for name, t in known[turn : turn + 1]} for known in mine]
        for name, read in (each for parcel in distributed.exchanged(parcels) for each in parcel.items()):
            if read is not None and (trajectory := read_of(has[name])) is not None:
                teacher.take_over(trajectory, read)


def prepare(parts: Parts, rollouts: list[Rollout], step: int) -> Prepared:
    """What the method makes of them, or made of them when they were sampled (rollout.refresh)."""
    if parts.refreshed is not None:
        made = parts.refreshed.prepared(rollouts, step)
    else:
        made = parts.method.prepare(rollouts, step=step)
    check_prepared(made, parts)
    return made
