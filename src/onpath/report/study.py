"""stub"""
from pathlib import Path
from typing import Any


def gather_study(directory: Path) -> dict[str, Any]:
    raise NotImplementedError
