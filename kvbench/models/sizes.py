"""Sizes of a model from its configuration file alone, for estimates; needs no PyTorch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What a model costs.

    Attributes:
        layers: number of layers; ``vocabulary`` number of token ids.
        context: number of tokens that it reads at most.
        heads: number of KV heads of a layer; ``width`` of a key, and of a value.
        entry_bytes: bytes of one cache entry over all layers and KV heads, in float32.
    """

    layers: int
    vocabulary: int
    context: int
    heads: int
    width: int

    @property
    def entry_bytes(self) -> int:
        return self.layers * self.heads * self.width * 2 * 4


def sizes_of(folder: Path) -> Sizes | None:
    """Read the sizes from ``config.json``; None if it does not say them."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        layers = int(_first(config, "num_hidden_layers", "n_layer"))
        heads = int(_first(config, "num_attention_heads", "n_head"))
        width = int(config.get("head_dim") or int(_first(config, "hidden_size", "n_embd")) // heads)
        kept = int(config.get("num_key_value_heads") or heads)
        context = int(_first(config, "max_position_embeddings", "n_positions"))
        return Sizes(layers, int(config["vocab_size"]), context, kept, width)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _first(config: dict[str, Any], *names: str) -> Any:
    return next(config[name] for name in names if name in config)
