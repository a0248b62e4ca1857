"""What is pushed to another engine is, for every family, what `save_pretrained` would write."""

from pathlib import Path

import pytest

from tests.engines.test_checkpoints import check_like_saved
from tests.families.build import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")  # of families as they come


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pushed_weights_are_a_checkpoint(family: str, lora: bool, tmp_path: Path) -> None:
    check_like_saved(family, lora, tmp_path)
