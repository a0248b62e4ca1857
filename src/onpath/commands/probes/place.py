"""One position that the probe of near futures looked at. No torch."""

from dataclasses import dataclass

GROUPS = ("high", "random", "low")
"""Positions of the highest loss, drawn at random, drawn at random from the lower half of the losses."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One position of one rollout, with both futures.

    >>> p = Place(prompt_id="7", position=2, token="8", groups=("high",), label="error", reverse_kl=2.0,
    ...           sampled_gap=3.0, distance=0.4, noise=None, student_text="81", teacher_text="72")
    >>> p.value("sampled_gap")
    3.0
    """

    prompt_id: str
    position: int
    token: str
    groups: tuple[str, ...]
    """Of `GROUPS`; empty for a position that was looked at for its label only."""
    label: str | None
    """What the task's checker says the token is; None: nobody knows."""
    reverse_kl: float
    sampled_gap: float
    """log p_S − log p_T of the token."""
    distance: float
    noise: float | None
    """Distance of two of the teacher's own sampled windows; None: not measured here."""
    student_text: str
    teacher_text: str

    def value(self, name: str) -> float:
        """A number by name."""
        return float(getattr(self, name))
