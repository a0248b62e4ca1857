"""Every causal family that transformers can build: right, or refused in one sentence.

Right: the loss of a step, its gradient and the log-probs of its samples are those of plain transformers,
which reads one row at a time, in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onpath.config.whole import Config
from onpath.system.errors import UserError
from tests.families.build import FAMILIES
from tests.families.plain import SMALL, compare, pair
from tests.families.table import write_table

Tiny = Callable[..., Config]
pytestmark = pytest.mark.filterwarnings("ignore")  # of families as they come


@pytest.fixture(scope="session")
def outcomes() -> Any:
    found: dict[str, str] = {}
    yield found
    if found.keys() == {*FAMILIES}:
        write_table(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_right_or_refused(family: str, tiny: Tiny, tmp_path: Path, outcomes: dict[str, str]) -> None:
    models = pair(tmp_path, family)
    try:
        wrong, said = compare(tiny(**models, **SMALL)), ""
    except UserError as refusal:
        wrong, said = "", str(refusal)
    assert not wrong
    assert "\n" not in said
    outcomes[family] = said


def test_there_are_enough() -> None:
    assert len(FAMILIES) >= 40
