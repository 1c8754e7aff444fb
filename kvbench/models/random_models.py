"""Models with random weights in published shapes, for timing without downloads.

Widths, layers, heads and vocabularies are those of the published configurations; since the weights
are random, only time and memory are meaningful. Tables of learned positions are extended to the
length of the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from kvbench.errors import UserError, unknown

PREFIX = "shape:"
"""Prefix of the name of a model that is given as a shape."""

_LLAMA = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}),
    "opt-125m": ("opt", {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
        "word_embed_proj_dim": 768, "vocab_size": 50272, "max_position_embeddings": 2048,
    }),
    "opt-1.3b": ("opt", {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192,
        "word_embed_proj_dim": 2048, "vocab_size": 50272, "max_position_embeddings": 2048,
    }),
    "pythia-160m": ("gpt_neox", {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }),
    "pythia-1.4b": ("gpt_neox", {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192,
        "vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }),
    "redpajama-3b": ("gpt_neox", {
        "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240,
        "vocab_size": 50432, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "use_parallel_residual": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    }),
    "qwen2.5-0.5b": ("qwen2", {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }),
    "llama-3.2-1b": ("llama", {
        **_LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }),
    "llama-3.1-8b": ("llama", {
        **_LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    }),
}
"""Name -> model type of transformers, and settings that differ from its defaults."""

_LEARNED = {"gpt2": "n_positions", "opt": "max_position_embeddings"}
"""Model types with learned positions, and the setting that holds the length of their table."""


class Shape(NamedTuple):
    """A configuration in a published shape.

    Attributes:
        config: configuration of transformers.
        context: context length of the published model.
        extended: length that the table of learned positions was extended to; None if it was not.
    """

    config: Any
    context: int
    extended: int | None


def is_shape(model: str) -> bool:
    return model.startswith(PREFIX)


def check_shape(model: str) -> str:
    """The name of a shape, without the prefix ``shape:``.

    Raises:
        UserError: there is no such shape; the message names the nearest one.
    """
    name = model.removeprefix(PREFIX)
    if name not in SHAPES:
        raise unknown("shape", name, SHAPES)
    return name


def make_shape(model: str, positions: int) -> Shape:
    """The configuration of a shape, for texts of up to ``positions`` tokens.

    Raises:
        UserError: there is no such shape.
    """
    from transformers import AutoConfig

    kind, settings = SHAPES[check_shape(model)]
    settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **settings}
    table = _LEARNED.get(kind)
    context = int(settings[table or "max_position_embeddings"])
    extended = positions if table and positions > context else None
    if extended and table:
        settings[table] = extended
    return Shape(AutoConfig.for_model(kind, **settings), context, extended)


def random_model(config: Any, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """A model of that shape with seeded random weights, in evaluation mode and frozen.

    Raises:
        UserError: there is not enough memory for its weights.
    """
    from transformers import AutoModelForCausalLM

    from kvbench.models.attention import register
    from kvbench.models.rope import dynamic_rotary

    torch.manual_seed(seed)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=register())
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"There is not enough memory for the weights of a {config.model_type} of that shape: "
                        f"{str(error).splitlines()[0]}", "Choose a smaller shape, or --dtype bfloat16.") from error
    dynamic_rotary(model)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]
