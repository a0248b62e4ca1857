"""Model directories of others: a sentence, or a model."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from onpath.config.sections import Student
from onpath.engines.models import context_length, load_model, load_tokenizer, stop_ids
from onpath.system.errors import UserError
from tests.faults.models import FOLDER, GONE, MODELS

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' words about what is refused or taken


@pytest.mark.parametrize("name", MODELS)
def test_a_sentence_or_a_model(
    name: str, model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, change, words = MODELS[name]
    directory = Path(shutil.copytree(model_dirs["student"], tmp_path / "model", copy_function=os.link))
    path = directory / file
    told = json.loads(path.read_text()) if isinstance(change, dict) and path.exists() else {}
    path.unlink(missing_ok=True)
    if change == FOLDER:
        path.mkdir()
    elif isinstance(change, dict):
        path.write_text(json.dumps({**told, **change}))
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        assert change == GONE
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    section, said = Student(model=str(directory)), ""
    try:
        model = load_model(section, "student.model", torch.device("cpu"))
        tokenizer = load_tokenizer(section, "student.model")
        assert stop_ids(model, tokenizer)
        assert context_length(model.config) > 0
    except UserError as error:
        said = str(error)
    assert re.search(words, said), said
    assert "model" in said or not said
    assert len(said) < 700
    assert not set("\n\x1b") & set(said)
