"""Where the bundled models are."""

from pathlib import Path
from typing import Literal, get_args

Role = Literal["student", "teacher", "persona"]
BUNDLED = Path(__file__).parent / "bundled"


def model_dir(name: Role) -> Path:
    """Directory of a bundled checkpoint, in Hugging Face format."""
    if name not in get_args(Role):
        raise ValueError(f"the gym bundles {', '.join(get_args(Role))}; not {name!r}")
    return BUNDLED / name
