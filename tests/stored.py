"""What runs have stored, read back as plain values."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def read_trajectories(run: Path) -> list[dict[str, Any]]:
    """All stored rows of a run, oldest step first."""
    files = sorted((run / "trajectories").glob("step_*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]
