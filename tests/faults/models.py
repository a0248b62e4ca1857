"""Model directories of others: which file is another, and words of the sentence; docs/make_reliability.py
counts them. `|^$`: or it is a model all the same."""

from typing import Any

GONE, FOLDER = "gone", "a directory"
Change = dict[str, Any] | bytes | str

_CANNOT = "cannot load a causal LM"
_SIZE = "which is no size"
_SHAPE = "have another shape|are missing|cannot load a causal LM"

MODELS: dict[str, tuple[str, Change, str]] = {
    "config.json gone": ("config.json", GONE, _CANNOT),
    "config.json a directory": ("config.json", FOLDER, "config.json"),
    "config.json empty": ("config.json", b"", "not valid JSON"),
    "config.json cut off": ("config.json", b'{"model_type": "qw', "not valid JSON"),
    "config.json 5": ("config.json", b"5", "int in place of an object"),
    "config.json null": ("config.json", b"null", "NoneType in place of an object"),
    "config.json a list": ("config.json", b"[]", "list in place of an object"),
    "config.json {}": ("config.json", b"{}", _CANNOT),
    "config.json in UTF-16": ("config.json", '{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "config.json of 5,000 brackets": ("config.json", b"[" * 5000, "nested too deeply"),
    "config.json with 5,000 digits": ("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}", "digits"),
    "no such family": ("config.json", {"model_type": "zzz"}, "zzz"),
    "a family that is a number": ("config.json", {"model_type": 5}, _CANNOT),
    "an image model": ("config.json", {"model_type": "vit"}, _CANNOT),
    "code of its own": ("config.json", {"model_type": "e", "auto_map": {"AutoConfig": "x.C"}}, "cannot load"),
    "hidden_size 10¹²": ("config.json", {"hidden_size": 10**12}, _SIZE),
    "hidden_size -1": ("config.json", {"hidden_size": -1}, _SIZE),
    "hidden_size 1.5": ("config.json", {"hidden_size": 1.5}, _SIZE),
    "hidden_size 33": ("config.json", {"hidden_size": 33}, _SHAPE),
    "hidden_size null": ("config.json", {"hidden_size": None}, _CANNOT),
    "vocab_size text": ("config.json", {"vocab_size": "many"}, _SIZE),
    "vocab_size true": ("config.json", {"vocab_size": True}, _SIZE),
    "vocab_size 0": ("config.json", {"vocab_size": 0}, _SIZE),
    "vocab_size smaller": ("config.json", {"vocab_size": 7}, _SHAPE),
    "layers text": ("config.json", {"num_hidden_layers": "two"}, _SIZE),
    "layers 10⁹": ("config.json", {"num_hidden_layers": 10**9}, _SIZE),
    "more layers": ("config.json", {"num_hidden_layers": 5, "layer_types": None}, "are missing"),
    "heads 0": ("config.json", {"num_attention_heads": 0}, _SIZE),
    "heads 3": ("config.json", {"num_attention_heads": 3}, _SHAPE),
    "key heads 0": ("config.json", {"num_key_value_heads": 0}, _CANNOT),
    "key heads text": ("config.json", {"num_key_value_heads": "x"}, _CANNOT),
    "intermediate_size 80": ("config.json", {"intermediate_size": 80}, "have another shape"),
    "head_dim 0": ("config.json", {"head_dim": 0}, _SHAPE),
    "head_dim text": ("config.json", {"head_dim": "x"}, _CANNOT),
    "an unknown activation": ("config.json", {"hidden_act": "magic"}, _CANNOT),
    "an activation that is a list": ("config.json", {"hidden_act": [1]}, _CANNOT),
    "rotary positions of no kind": ("config.json", {"rope_parameters": {"rope_type": "magic"}}, _CANNOT),
    "rotary positions text": ("config.json", {"rope_parameters": "x"}, _CANNOT),
    "layer types unknown": ("config.json", {"layer_types": ["magic", "magic"]}, _CANNOT),
    "dtype unknown": ("config.json", {"dtype": "float7"}, "cannot load|^$"),
    "positions text": ("config.json", {"max_position_embeddings": "x"}, "cannot load|^$"),
    "pad id beyond the vocabulary": ("config.json", {"pad_token_id": 10**6}, _CANNOT),
    "weights gone": ("model.safetensors", GONE, "model.safetensors|weights"),
    "weights a directory": ("model.safetensors", FOLDER, "model.safetensors|weights"),
    "weights empty": ("model.safetensors", b"", "damaged|cannot load"),
    "weights text": ("model.safetensors", b"hello, I am weights", "damaged|cannot load"),
    "weights a pickle": ("model.safetensors", b"\x80\x04cos\nsystem\n", "damaged|cannot load"),
    "a header of 2⁶³ bytes": ("model.safetensors", b"\xff" * 7 + b"\x7f{}", "damaged|cannot load"),
    "a header that is a list": ("model.safetensors", b"\x02" + b"\x00" * 7 + b"[]", "damaged|cannot load"),
    "no tensors": ("model.safetensors", b"\x02" + b"\x00" * 7 + b"{}", "are missing"),
    "an index of pickles": (
        "model.safetensors.index.json", {"weight_map": {"a": "evil.bin"}}, "only .safetensors files beside it"
    ),
    "an index that leaves": (
        "model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "only .safetensors files"
    ),
    "an index of nothing": (
        "model.safetensors.index.json", {"weight_map": {"a": "gone.safetensors"}}, "which is not there"
    ),
    "an index without a map": ("model.safetensors.index.json", {"metadata": {}}, "weight_map is missing"),
    "an index that is text": ("model.safetensors.index.json", b"x", "not valid JSON"),
    "generation_config.json text": ("generation_config.json", b"hello", "cannot load|^$"),
    "generation_config.json a list": ("generation_config.json", b"[1]", "cannot load|^$"),
    "EOS text": ("generation_config.json", {"eos_token_id": "x"}, "no token id"),
    "EOS a list of texts": ("generation_config.json", {"eos_token_id": ["x", None]}, "no token id"),
    "EOS true": ("generation_config.json", {"eos_token_id": True}, "no token id"),
    "EOS -1": ("generation_config.json", {"eos_token_id": -1}, "no token id"),
    "tokenizer gone": ("tokenizer.json", GONE, "cannot load a tokenizer|has no tokenizer"),
    "tokenizer a directory": ("tokenizer.json", FOLDER, "cannot load a tokenizer"),
    "tokenizer empty": ("tokenizer.json", b"", "cannot load a tokenizer"),
    "tokenizer {}": ("tokenizer.json", b"{}", "cannot load a tokenizer"),
    "tokenizer 5": ("tokenizer.json", b"5", "cannot load a tokenizer"),
    "tokenizer of 5,000 brackets": ("tokenizer.json", b"[" * 5000, "cannot load a tokenizer"),
    "tokenizer of no kind": ("tokenizer.json", {"model": {"type": "Magic"}}, "cannot load a tokenizer"),
    "tokenizer without words": (
        "tokenizer.json", {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}, "tokenizer|^$"
    ),
    "tokenizer_config.json text": ("tokenizer_config.json", b"x", "cannot load a tokenizer"),
    "tokenizer_config.json null": ("tokenizer_config.json", b"null", "cannot load a tokenizer"),
    "tokenizer_config.json a list": ("tokenizer_config.json", b"[1]", "cannot load a tokenizer"),
    "a tokenizer class of no kind": (
        "tokenizer_config.json", {"tokenizer_class": "os.system"}, "cannot load a tokenizer|^$"
    ),
    "a tokenizer class that is a number": (
        "tokenizer_config.json", {"tokenizer_class": 5}, "cannot load a tokenizer|^$"
    ),
    "EOS token a number": ("tokenizer_config.json", {"eos_token": 5}, "cannot load a tokenizer"),
    "EOS token an object": ("tokenizer_config.json", {"eos_token": {"a": 1}}, "cannot load a tokenizer|^$"),
    "longest text negative": ("tokenizer_config.json", {"model_max_length": "x"}, "cannot load a tok|^$"),
    "template a directory": ("chat_template.jinja", FOLDER, "cannot load a tokenizer|^$"),
    "template binary": ("chat_template.jinja", b"\xff\xfe", "cannot load a tokenizer"),
}  # fmt: skip
"""Name → file, what it is now (keys of JSON, bytes, gone, a directory), words."""
