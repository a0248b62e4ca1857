"""Tiny random models of any family, and plain transformers beside them."""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64  # the tokenizer has fewer ids: the rest is padding

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "bloom": {"n_head": 4, "n_layer": 2},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 256},
    "ctrl": {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 128, "n_positions": 256},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 8, "num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 8},
    "gpt_neo": {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16,
        "max_position_embeddings": 256,
    },
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 256},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8,
              "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "llama4_text": {"intermediate_size_mlp": 128, "attention_chunk_size": 32, "num_experts_per_tok": 1},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "nemotron_h": {**_MAMBA, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8,
                   "chunk_size": 16, "layers_block_type": ["mamba", "attention"]},
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {
        "lru_width": 64, "attention_window_size": 16, "block_types": ["recurrent", "attention"],
    },
    "roberta": {"is_decoder": True},
    "rwkv": {"attention_hidden_size": 64, "context_length": 256},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128},
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "chunkwise_kernel": "chunkwise--native_autograd",
              "sequence_kernel": "native_sequence__native", "step_kernel": "native", "chunk_size": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "mamba_ngroups": 1,
               "n_mamba_heads": 8, "chunk_size": 16, "num_mem_blocks": 1, "num_key_value_heads": 4},
}  # fmt: skip
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
for _name in ("gpt2", "gpt_bigcode"):
    _OWN[_name] = _GPT2

FAMILIES = (
    "apertus", "arcee", "bamba", "bert", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2", "ctrl",
    "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "ernie4_5", "exaone4", "falcon",
    "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe",
    "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe",
    "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "jamba", "lfm2", "llama",
    "llama4_text", "mamba", "mamba2", "minimax", "ministral", "mistral", "mixtral", "modernbert-decoder",
    "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "openai-gpt", "opt",
    "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe",
    "qwen3_next", "recurrent_gemma", "roberta", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2",
    "vaultgemma", "xglm", "xlnet", "xlstm", "zamba2",
)  # fmt: skip


def build(family: str, seed: int, **changes: Any) -> PreTrainedModel:
    """Weights spread enough that a wrong prefix moves the log-probs by far more than rounding."""
    kind = CONFIG_MAPPING[family]
    known = {*kind().to_dict(), *kind.attribute_map}
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    config = kind(**{**sizes, **_OWN.get(family, {}), **changes})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.15)
    for name, p in model.named_parameters():
        if p.ndim == 3 and "expert" in name:
            nn.init.normal_(p, std=0.15)
    if model.generation_config is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model.eval()
