"""docs/models.md, as the sweep found it."""

from collections.abc import Mapping
from pathlib import Path

import transformers

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def write_table(outcomes: Mapping[str, str]) -> None:
    """The page; an empty outcome is right."""
    right = sorted(name for name, sentence in outcomes.items() if not sentence)
    rows = [f"| `{n}` | {s.removeprefix('student.model: ')} |" for n, s in sorted(outcomes.items()) if s]
    PAGE.write_text(
        "\n".join(
            [
                _HEAD.format(version=transformers.__version__, n=len(right)),
                *_wrapped(right),
                _REFUSED,
                *rows,
                "",
            ]
        )
    )


def _wrapped(names: list[str]) -> list[str]:
    lines = [""]
    for name in names:
        piece = f"`{name}`, "
        if len(lines[-1]) + len(piece) > 98:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines[:-1]] + [lines[-1].rstrip(", ") + "."]


_HEAD = """# Models

`make test-families` builds a tiny random model of each family below (transformers {version}) and trains
it for a step. This page is what it found.

**Right** ({n} families): loss (1e-4), gradient (1e-3) and the log-probs of the samples (1e-3 nats) are
those of plain transformers, which reads one row at a time in float32."""
_REFUSED = """
**Refused**, before anything is trained, in these words:

| family | sentence |
|---|---|"""
