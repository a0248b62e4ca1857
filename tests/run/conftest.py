"""Rows of two subjects, and a teacher for each."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_model, make_tokenizer

Options = dict[str, Any]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums of two subjects, more of one than of the other, in turns and not."""
    path = tmp_path_factory.mktemp("subjects") / "rows.jsonl"
    rows = [
        {"id": str(i), "prompt": f"{i}+{7 * i}=?", "answer": str(8 * i), "of": "code" if i % 3 else "math"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third model, of another width."""
    path = tmp_path_factory.mktemp("models") / "other"
    make_model(2, hidden=40).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def two(model_dirs: dict[str, Path], other: Path, subjects: Path) -> Options:
    """Teachers of other weights."""
    return {
        "teachers__math": {"model": str(model_dirs["teacher"]), "device": "cpu"},
        "teachers__code": {"model": str(other), "device": "cpu"},
        "data__train": str(subjects),
        "data__teacher_column": "of",
    }
