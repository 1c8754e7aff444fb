"""What a model puts into its cache, which turns bytes into entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class LayerShape(NamedTuple):
    """Of one layer: its heads, and the numbers in a key and in a value."""

    heads: int
    keys: int
    values: int


@dataclass(frozen=True)
class CacheShape:
    """Of keys and values, as they are cached.

    Attributes:
        layers: of the cache.
        itemsize: bytes of a number.
    """

    layers: tuple[LayerShape, ...]
    itemsize: int

    @classmethod
    def even(cls, layers: int, heads: int, width: int, itemsize: int) -> CacheShape:
        """Of layers that are all alike, with keys and values of one width."""
        return cls((LayerShape(heads, width, width),) * layers, itemsize)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry of one text in all layers."""
        return sum(heads * (keys + values) for heads, keys, values in self.layers) * self.itemsize

    @property
    def widths(self) -> set[int]:
        """The numbers that keys and values have."""
        return {width for layer in self.layers for width in (layer.keys, layer.values)}
