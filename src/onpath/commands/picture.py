"""Pictures as PNG, all in one manner."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onpath.system.files import written

_DOTS = 150


@contextmanager
def picture(
    path: Path, *, size: tuple[float, float], rows: int = 1, columns: int = 1, one_x: bool = True
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its panels, row by row, to be drawn on; at the end they are written, whole or not at all.

    Args:
        size: width and height, inches.
        rows: of panels.
        one_x: those of several rows share their x.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, sharex=one_x and rows > 1, squeeze=False).flat)
    yield figure, panels
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=_DOTS, format="png")
