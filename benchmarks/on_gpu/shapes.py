"""Models of published shapes with random weights, made on the device: nothing large lies on a disk."""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from on_gpu.device import DEVICE

SIZES: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False,
    },
    "60m": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_768, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""As their config.json files have them, and one of our own that a CPU can train; context 8,192."""
_TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 256,
}  # fmt: skip
_END = 2  # id of the stop token


def write_model(directory: Path, size: str, *, tiny: bool, words: int | None = None) -> None:
    """Config and tokenizer of a model; `random_weights` makes the rest. One token per word: w0 w1 …

    Args:
        size: a key of `SIZES`; with -teacher behind it, another model of that size.
        words: of the tokenizer; None: the whole vocabulary.
    """
    shape = SIZES[size.removesuffix("-teacher")] | (_TINY if tiny else {})
    kind = LlamaConfig if size.startswith("smollm2") else Qwen3Config
    config = kind(**shape, max_position_embeddings=8192, bos_token_id=1, eos_token_id=_END, pad_token_id=0)
    config.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(directory)
    names = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, words or shape["vocab_size"]))]
    core = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)


def build(directory: Path | str, dtype: torch.dtype, **options: Any) -> Any:
    """The model of a directory of `write_model`, on the device; its weights depend on the directory's
    name."""
    torch.manual_seed(zlib.crc32(Path(directory).name.encode()))
    with torch.device(DEVICE):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype, **options)
    made.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=_END, pad_token_id=0)
    return made.eval()


@contextmanager
def random_weights() -> Iterator[None]:
    """While transformers' loader makes models of `write_model`'s directories instead of reading weights."""
    real = AutoModelForCausalLM.from_pretrained

    def made(where: Any, *, dtype: torch.dtype, output_loading_info: bool = False, **_: Any) -> Any:
        model = build(where, dtype)
        return (model, {"missing_keys": [], "mismatched_keys": []}) if output_loading_info else model

    AutoModelForCausalLM.from_pretrained = made
    try:
        yield
    finally:
        AutoModelForCausalLM.from_pretrained = real


def write_prompts(path: Path, count: int, words: int, vocabulary: int) -> None:
    """So many prompts of so many tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (count, words), generator=generator).tolist()
    lines = [
        json.dumps({"id": str(i), "prompt": " ".join(f"w{t}" for t in row)}) for i, row in enumerate(ids)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
