"""Where the bundled models are."""

from pathlib import Path
from typing import Literal

Role = Literal["student", "teacher"]


def model_dir(name: Role) -> Path:
    """Directory of a bundled checkpoint, in Hugging Face format."""
    if name not in ("student", "teacher"):
        raise ValueError(f"the gym bundles a student and a teacher; not {name!r}")
    return Path(__file__).parent / "bundled" / name
