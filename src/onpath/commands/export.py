"""`onpath export`: a Hugging Face model directory of a run or of any of its checkpoints."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from onpath.engines import adapters
from onpath.engines.foreign import check_adapter
from onpath.engines.models import load_model, load_tokenizer, quietly
from onpath.run.card import of_merged
from onpath.run.trained import Trained, find, load_its_tokenizer, load_trained
from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.files import place, written
from onpath.system.streams import say


def export_model(source: str | Path, out: str | Path, *, adapter: bool = False) -> Path:
    """Writes a model that `AutoModelForCausalLM.from_pretrained(out)` loads by itself, with its tokenizer.

    Whole or not at all. A LoRA adapter is merged into the weights of its base.

    Args:
        source: a run directory, of which the final model is taken or, while there is none, the newest sound
            checkpoint; one of its `checkpoints/step_N`; or its `best`.
        out: a directory that does not exist.
        adapter: of a LoRA run, the adapter alone, not merged.

    Returns:
        `out`.

    Raises:
        UserError: no run or checkpoint there, a damaged one, no adapter, a base model that is gone, or `out`
            exists or cannot be written.
    """
    code.not_while_loading("onpath.export_model")
    target = place(out)
    if target.exists():
        raise UserError(f"{target} is there already; name a directory that is not")
    found = find(source)
    if found is None:
        raise UserError(f"{source}: neither a run directory nor one of its checkpoints/step_N")
    if found.instead:
        say(f"onpath: {found.shown(str(source))} is exported: the run has no sound final model")
    lora = found.config().student.lora_rank
    if adapter and not lora:
        raise UserError(f"{found.run}: this run trained all weights, so it has no adapter")
    if not found.is_checkpoint and (adapter or not lora):
        _check_whole(found, adapter=adapter)
        with written(target) as temporary:
            shutil.copytree(found.weights, temporary)
            adapters.name_base(temporary, home=target)
        return target
    model = load_trained(found, adapter=adapter)
    tokenizer = load_its_tokenizer(found.config().student, found, "student.model")
    with quietly(), written(target, also=(SafetensorError,)) as temporary:
        adapters.save(model, temporary, home=target)
        tokenizer.save_pretrained(temporary)
        if (card := found.weights / "README.md").is_file():  # no checkpoint has one
            (temporary / "README.md").write_text(of_merged(card.read_text("utf-8")), encoding="utf-8")
    return target


def _check_whole(found: Trained, *, adapter: bool) -> None:
    """What is copied must load where it goes. An adapter's base may be elsewhere.

    Raises:
        UserError: it would not.
    """
    section = found.config().student.model_copy(update={"model": str(found.weights)})
    if adapter:
        check_adapter(found.weights, "source")
        return
    load_model(section, "source", torch.device("cpu"))
    load_tokenizer(section, "source")
