"""Intervals over problems and over seeds together. Pure; no torch.

Legend: S seeds (runs), P problems. A score is the mean over the samples of one problem by one run. All runs
answer the same problems, so seeds and problems are crossed: x_sp = μ + a_s + b_p + e_sp. The variance of the
mean is estimated from the two-way analysis of variance,

    Var(x̄) = (MS_S + MS_P − MS_E) / (S·P)   which estimates   σ_a²/S + σ_b²/P + σ_e²/(S·P),

and from four seeds on the interval is x̄ ± t·√Var with Satterthwaite's degrees of freedom: the t interval of
crossed random effects (Clark 1973, quasi-F). With two or three seeds MS_S alone has so few degrees of freedom
that Satterthwaite's number, itself an estimate, is too high too often: such intervals cover 88% and 92%
instead of 95. There each part has its own t,

    half² = (t²(S−1)·MS_S + t²(P−1)·max(0, MS_P − MS_E)) / (S·P),
            at least t²(P−1)·max(MS_P, MS_E) / (S·P), as if the seeds had no part

which covers at least 95% whatever the share of the seeds in the variance, and is wide where they have none:
two seeds do not tell. The floor is for seeds whose means are equal by chance, as two are in one study of
twenty with few problems: a width of zero is no finding. A bootstrap that resamples five seeds is too narrow:
it takes the normal's 1.96, shrunk by √(4/5), where t with four degrees asks for 2.78.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from onpath.evaluate.stats import (
    ROUNDING,
    bootstrap_interval,
    difference_interval,
    sign_flip_p_value,
    wilson_interval,
    with_unseen,
)

PROBLEMS_ONLY = "problems only"
BOTH = "problems and seeds"
_ENOUGH_SEEDS = 4
"""From which on Satterthwaite's degrees of freedom can be trusted."""
_NOTHING = 1e-9
"""Mean squares are sums of rounded numbers: what is less than so much of another one is 0."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95% interval.

    >>> estimate(np.array([[0.0, 1.0, 0.5]])).over
    'problems only'
    """

    mean: float
    ci95: tuple[float, float]
    over: str
    """What the interval covers: problems and seeds, or with one run problems only."""
    p_value: float | None = None
    """Two-sided, of a difference being 0."""


def estimate(scores_SP: NDArray[np.float64]) -> Estimate:
    """Of a mean score, each score within [0, 1]."""
    runs, problems = scores_SP.shape
    mean = float(scores_SP.mean())
    if runs == 1:
        return Estimate(mean=mean, ci95=bootstrap_interval(scores_SP[0]), over=PROBLEMS_ONLY)
    if problems == 1 or np.ptp(scores_SP) <= ROUNDING:  # a spread of zero would claim certainty
        return Estimate(mean=mean, ci95=wilson_interval(mean, trials=problems), over=BOTH)
    half = _half_width(scores_SP)
    ends = with_unseen((mean - half, mean + half), scores_SP.mean(axis=0), least=0.0)
    return Estimate(mean=mean, ci95=ends, over=BOTH)


def difference(differences_SP: NDArray[np.float64]) -> Estimate:
    """Of a mean paired difference (same seed, same problem), each within [−1, 1]."""
    runs, problems = differences_SP.shape
    mean = float(differences_SP.mean())
    over = PROBLEMS_ONLY if runs == 1 else BOTH
    if problems > 1 and np.ptp(differences_SP) <= ROUNDING:
        ends = with_unseen((mean, mean), differences_SP.mean(axis=0), least=-1.0)
        return Estimate(mean=mean, ci95=ends, over=over, p_value=p_value(differences_SP))
    if runs == 1:
        return Estimate(
            mean=mean,
            ci95=difference_interval(differences_SP[0]),
            over=over,
            p_value=sign_flip_p_value(differences_SP[0]),
        )
    if problems == 1:
        return Estimate(mean=mean, ci95=(-1.0, 1.0), over=over, p_value=1.0)
    half = _half_width(differences_SP)
    ends = with_unseen((mean - half, mean + half), differences_SP.mean(axis=0), least=-1.0)
    return Estimate(mean=mean, ci95=ends, over=over, p_value=p_value(differences_SP))


def p_value(differences_SP: NDArray[np.float64]) -> float:
    """Two-sided, of a mean paired difference being 0, by t alone: quick, for many pairs."""
    runs, problems = differences_SP.shape
    mean = float(differences_SP.mean())
    if problems == 1 or abs(mean) <= ROUNDING:
        return 1.0
    if np.ptp(differences_SP) <= ROUNDING:
        return float(2.0 ** (1 - problems))  # of all patterns of signs, these two are as far from 0
    if 2 <= runs < _ENOUGH_SEEDS:
        return _level_reaching(differences_SP, abs(mean))
    if runs == 1:
        variance, freedom = float(np.var(differences_SP, ddof=1)) / problems, float(problems - 1)
    else:
        variance, freedom = crossed_variance(differences_SP)
    return float(2 * stdtr(freedom, -abs(mean) / variance**0.5))


def _half_width(values_SP: NDArray[np.float64]) -> float:
    """Of the 95% interval; S ≥ 2 and P ≥ 2."""
    runs, problems = values_SP.shape
    if runs >= _ENOUGH_SEEDS:
        variance, freedom = crossed_variance(values_SP)
        return float(stdtrit(freedom, 0.975) * variance**0.5)
    return _half_width_of_few_seeds(_mean_squares(values_SP), runs, problems, 0.05)


def _half_width_of_few_seeds(
    mean_squares: tuple[float, float, float], runs: int, problems: int, level: float
) -> float:
    by_seed, by_problem, by_both = mean_squares
    seeds, others = (float(stdtrit(n - 1, level / 2)) ** 2 for n in (runs, problems))
    both = seeds * by_seed + others * max(0.0, by_problem - by_both)
    return float((max(both, others * max(by_problem, by_both)) / (runs * problems)) ** 0.5)


def _level_reaching(values_SP: NDArray[np.float64], distance: float) -> float:
    """The level whose interval ends just at 0, by halving: the two-sided p-value of few seeds."""
    runs, problems = values_SP.shape
    mean_squares = _mean_squares(values_SP)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        half = _half_width_of_few_seeds(mean_squares, runs, problems, middle)
        low, high = (middle, high) if half > distance else (low, middle)
    return high


def crossed_variance(values_SP: NDArray[np.float64]) -> tuple[float, float]:
    """Variance of the grand mean and its degrees of freedom; S ≥ 2 and P ≥ 2.

    Where seeds (or problems) happen to differ by less than their interaction explains, their part would be
    negative: then it is left out, and the other's stands alone. Where neither differ, the interaction is all.
    """
    runs, problems = values_SP.shape
    by_seed, by_problem, by_both = _mean_squares(values_SP)
    if by_seed < by_both or by_problem < by_both:
        larger, freedom = max((by_seed, runs - 1), (by_problem, problems - 1))
        if larger < _NOTHING * by_both:
            larger, freedom = by_both, (runs - 1) * (problems - 1)
        return larger / (runs * problems), freedom
    total = by_seed + by_problem - by_both
    spread = (
        by_seed**2 / (runs - 1) + by_problem**2 / (problems - 1) + by_both**2 / ((runs - 1) * (problems - 1))
    )
    return total / (runs * problems), total**2 / spread


def _mean_squares(values_SP: NDArray[np.float64]) -> tuple[float, float, float]:
    """MS_S, MS_P and MS_E."""
    runs, problems = values_SP.shape
    seed_means, problem_means = values_SP.mean(axis=1), values_SP.mean(axis=0)
    rest_SP = values_SP - seed_means[:, None] - problem_means[None, :] + values_SP.mean()
    return (
        problems * float(np.var(seed_means, ddof=1)),
        runs * float(np.var(problem_means, ddof=1)),
        float((rest_SP**2).sum()) / ((runs - 1) * (problems - 1)),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of one false claim among all of them stays at 5%.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
