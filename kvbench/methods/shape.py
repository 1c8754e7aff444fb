"""The shape of a model's cache, which turns bytes into entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CacheShape:
    """Of keys and values together.

    Attributes:
        layers, heads, width: of the cache.
        itemsize: bytes of a number.
    """

    layers: int
    heads: int
    width: int
    itemsize: int

    @classmethod
    def of(cls, config: Any, itemsize: int) -> CacheShape:
        """Of a model with that configuration."""
        heads = int(config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        grouped = int(getattr(config, "num_key_value_heads", None) or heads)
        return cls(int(config.num_hidden_layers), grouped, int(width), itemsize)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry of one text in all layers."""
        return 2 * self.layers * self.heads * self.width * self.itemsize
