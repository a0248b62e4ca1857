"""What the teacher says along responses, as sums with counts (see `Prepared.means`): OPSD's and TRD's."""

from collections.abc import Sequence

from onpath.engines.forward import Values

Means = dict[str, tuple[float, float]]


def mean(values: Sequence[float | bool]) -> tuple[float, float]:
    return float(sum(values)), float(len(values))


def token_means(values: Sequence[Values], verdicts: Sequence[bool | None]) -> Means:
    """Along y: divergence by verdict, epistemic mass, perplexity gap."""
    means: Means = {}
    for name, wanted in (("right", True), ("wrong", False)):
        kl = [
            x for v, ok in zip(values, verdicts, strict=True) if ok is wanted for x in v.get("reverse_kl", ())
        ]
        means[f"reverse_kl_y_{name}_nats"] = mean(kl)
    return means | response_means(values, "y")


def response_means(values: Sequence[Values], name: str) -> Means:
    """Of one kind of response: the teacher's mass on openings of a correction, and by how much the teacher's
    log perplexity exceeds the student's, both over all tokens."""
    gaps = [
        s - t
        for v in values
        if "teacher_logp" in v
        for s, t in zip(v["student_logp"], v["teacher_logp"], strict=True)
    ]
    return {
        f"epistemic_mass_{name}": mean([x for v in values for x in v.get("teacher_mass", ())]),
        f"log_perplexity_gap_{name}_nats": mean(gaps),
    }
