"""Small random models of a few families, made on the spot, and adapters for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvbench.methods import Method
from kvbench.methods.adapters import fresh_adapter
from kvbench.methods.memories.memory import Memory
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.models.attention import register

FAMILIES = ("llama", "qwen3", "mistral", "neox", "opt", "gpt2")
VOCABULARY = 97
CONTEXT = 256


def small_config(family: str, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> Any:
    import transformers as hf

    sizes = {"vocab_size": vocabulary, "max_position_embeddings": context}
    marks = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    match family:
        case "llama":
            return hf.LlamaConfig(
                hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.1, **sizes, **marks)
        case "qwen3":
            return hf.Qwen3Config(
                hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, initializer_range=0.1, **sizes, **marks)
        case "mistral":
            return hf.MistralConfig(
                hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, sliding_window=None, initializer_range=0.1, **sizes, **marks)
        case "neox":
            return hf.GPTNeoXConfig(
                hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                initializer_range=0.1, **sizes, **marks)
        case "opt":
            return hf.OPTConfig(
                hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, init_std=0.1,
                word_embed_proj_dim=64, **sizes, **{**marks, "pad_token_id": 1})
        case "gpt2":
            return hf.GPT2Config(
                vocab_size=vocabulary, n_positions=context, n_embd=64, n_layer=3, n_head=4,
                initializer_range=0.1, **marks)
    raise ValueError(family)


def small_model(family: str, **sizes: int) -> nn.Module:
    """A random model of a family, with weights large enough for attention to matter."""
    import transformers as hf

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(small_config(family, **sizes), attn_implementation=register())
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def normalises_keys(model: nn.Module) -> bool:
    """Whether keys are normalised after their projection, so that coordinates of it (lorc) do not give them."""
    return "Qwen3" in type(model).__name__


def small_card(gate: str = "gated", method: str = "sentinel", n_rows: int = 2, **options: str) -> AdapterCard:
    return AdapterCard(method, gate, 4, 4.0, n_rows, "small", "hash", options=options)


def small_adapter(
    model: nn.Module, gate: str = "gated", n_rows: int = 2, method: str = "sentinel", **options: str
) -> Adapter:
    """An adapter that changes what it acts on."""
    torch.manual_seed(1)
    adapter = fresh_adapter(small_card(gate, method, n_rows, **options), model)
    for pair in adapter.by_path.values():
        nn.init.normal_(pair.b, std=0.2)
    with torch.no_grad():
        for weight in adapter.whole.values():
            weight.mul_(1.1)
    return adapter.eval().requires_grad_(False)


def adapter_for(model: nn.Module, method: Method, gate: str | None = None) -> Adapter | None:
    """An adapter that the method can be read with; None if it needs none."""
    if not method.adapter_kinds:
        return None
    own = method.trained_options if isinstance(method, Memory) else {}
    name = method.name if isinstance(method, Memory) else "sentinel"
    return small_adapter(model, gate or method.adapter_kinds[0], method.n_rows, name, **own)
