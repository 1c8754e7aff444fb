"""Small random models of the causal types of transformers, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 97

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16,
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "ffn_dim": 96, "word_embed_proj_dim": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
    "initializer_range": 0.1, "init_std": 0.1,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8, "num_key_value_heads": 4,
}
_GEMMA3N: dict[str, Any] = {
    "layer_types": ["full_attention"] * 4, "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [96] * 4,
    "num_kv_shared_layers": 0,
}
_HYBRID: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2,
        "mamba_d_state": 16,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), _LATENT),
    **_HYBRID, "gemma3n_text": _GEMMA3N, "mistral": {"sliding_window": None},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
}
"""What a type needs besides the common sizes."""


def zoo_config(kind: str, **more: Any) -> Any:
    """A small configuration of a model type; what the type does not know is left out."""
    config = CONFIG_MAPPING[kind]
    known = set(config().to_dict()) | set(getattr(config, "attribute_map", {}))
    return config(**{name: value for name, value in _SIZES.items() if name in known} | SPECIAL.get(kind, {}) | more)


def zoo_model(kind: str, attention: str = "eager", **more: Any) -> nn.Module:
    """A small random model of a type, the same every time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(zoo_config(kind, **more), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # what begins at 0 or 1 hides the parts that it scales
            if parameter.numel() > 1 and float(parameter.std()) == 0:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def zoo_text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
