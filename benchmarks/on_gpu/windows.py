"""TOPD's windows: forward passes of the teacher (rounds), tokens a round, and their share of `correct`."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from on_gpu import long
from on_gpu.device import free, seconds
from onpath.training import sample


def run(record: Any, *, tiny: bool, left: Any) -> None:
    size = long.published(tiny=tiny, rollouts=16, response=1024)
    with TemporaryDirectory() as directory:
        parts = long.make(Path(directory), size, {"name": "topd", "window": size.window})
        rollouts = sample(parts, 0)
        teacher = parts.models.teacher.model
        settings = [(size.window, True), (24 if not tiny else 3, True), (size.window, False)]
        for window, reuse in [settings[0], *settings]:  # the first one warms up
            if left() < 10 and not tiny:
                return
            changed = long.with_method(parts, {"name": "topd", "window": window, "reuse_cache": reuse})
            with long.counted_calls(teacher) as calls:
                kept: dict[str, Any] = {}
                whole = seconds(lambda to=kept, by=changed: to.update(it=by.method.prepare(rollouts, step=0)))
            prepared = kept["it"]
            spent, total = prepared.metrics["topd_seconds"], prepared.totals
            record(
                "TOPD's windows (the first row warms up)",
                **{"K": window, "from the scoring pass": reuse, "rollouts": len(rollouts)},
                windows=total["fork_candidates"],
                **{"window tokens": total["teacher_tokens_generated"], "rounds": len(calls)},
                **{"tokens a round": total["teacher_tokens_generated"] / max(1, len(calls))},
                **{"fed tokens": sum(calls), "correct, s": whole},
                **{f"{name}, s": value for name, value in spent.items()},
                **{"share of windows": spent["windows"] / whole},
            )
            del prepared, kept
            free()
