"""TOPD's fourth stage: real forks, surface mismatches, suppression."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from onpath.config.methods.topd import TOPDOptions
from onpath.methods.topd.candidates import NO_DISTANCE, NO_LOSS, Fork
from onpath.system import distributed


def quantile_of(forks: Sequence[Fork], options: TOPDOptions) -> float | None:
    """This step's own quantile over all processes; None where the rule has none or there is no candidate."""
    match options.decide:
        case "quantile":
            values, level = [f.distance for f in forks], options.drop_share
        case "sampled_gap":
            values, level = [f.gap for f in forks], options.drop_share
        case "upper_quartile_of_low_loss":
            values, level = [f.distance for f in forks if f.decision == "reference"], 0.75
        case _:
            return None
    return shared_quantile(values, level)


def shared_quantile(values: Sequence[float], level: float) -> float | None:
    """Over all processes, each of which must call; None: there is no value."""
    everyone = distributed.gather(values)
    return float(np.quantile(everyone, level)) if everyone else None


def follow(threshold: Tensor, quantile: float | None, *, decay: float) -> None:
    """Moves a threshold, in place, towards a step's quantile, if there is one; NaN is no threshold yet."""
    if quantile is not None:
        before = 0.0 if threshold.isnan() else decay
        threshold.copy_(before * threshold.nan_to_num() + (1 - before) * quantile)


def decided(forks: Sequence[Fork], options: TOPDOptions, threshold: float) -> list[Fork]:
    """Each candidate is a real fork or a surface mismatch; forks closer than K/2 yield to the larger D."""

    def real(f: Fork) -> bool:
        match options.decide:
            case "quantile" | "upper_quartile_of_low_loss":
                return f.distance >= threshold and f.distance > NO_DISTANCE and f.loss > NO_LOSS
            case "threshold":
                return f.distance >= options.threshold and f.distance > NO_DISTANCE and f.loss > NO_LOSS
            case "sampled_gap":
                return f.gap >= threshold
            case "random_positions":
                return f.draw >= options.drop_share
            case "all_high_loss":
                return True

    found = [
        f if f.decision == "reference" else replace(f, decision="fork" if real(f) else "surface")
        for f in forks
    ]
    return found if options.overlap != "suppress" else _thinned(found, options.window / 2)


def _thinned(forks: Sequence[Fork], least: float) -> list[Fork]:
    kept: dict[int, list[int]] = {}
    close: set[tuple[int, int]] = set()
    for f in sorted((f for f in forks if f.decision == "fork"), key=lambda f: (-f.distance, f.position)):
        if all(abs(f.position - p) >= least for p in kept.setdefault(f.row, [])):
            kept[f.row].append(f.position)
        else:
            close.add((f.row, f.position))
    return [replace(f, decision="too_close") if (f.row, f.position) in close else f for f in forks]


def suppressed(forks: Sequence[Fork], options: TOPDOptions) -> list[Fork]:
    """Capped weights for the surface mismatches (`low`), or for as many others drawn by lot (`high`)."""
    if options.suppress == "none":
        return list(forks)
    surface = [f for f in forks if f.decision == "surface"]
    chosen = {(f.row, f.position) for f in surface}
    if options.suppress == "high":
        rest = [f for f in forks if f.decision in ("fork", "too_close")]
        everyone = sorted(distributed.gather([f.draw for f in rest]))
        (surfaces,) = distributed.total([len(surface)])
        count = min(int(surfaces), len(everyone))
        limit = everyone[count - 1] if count else -1.0
        chosen = {(f.row, f.position) for f in rest if f.draw <= limit}
    return [replace(f, weight=f.cap) if (f.row, f.position) in chosen else f for f in forks]
