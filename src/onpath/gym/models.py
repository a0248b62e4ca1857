"""Where the bundled models are."""

from pathlib import Path
from typing import Literal

Role = Literal["student", "teacher"]
BUNDLED = Path(__file__).parent / "bundled"


def model_dir(name: Role) -> Path:
    """Directory of a bundled checkpoint, in Hugging Face format."""
    if name not in ("student", "teacher"):
        raise ValueError(f"the gym bundles a student and a teacher; not {name!r}")
    return BUNDLED / name
