"""A cache whose entries are chosen while it is read: each row and head of a layer holds its own.

All heads of a layer hold equally many, so that a layer is one tensor and what is removed is freed; layers may differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.cache.evicting import EvictingCache, EvictingLayer
from kvbench.models.rotary import rotated


class PolicedLayer(EvictingLayer):
    """Keys and values ``[batch, heads, entries, width]``, and what a policy knows of them.

    Attributes:
        positions: int64 ``[batch, heads, entries]``, the place of each entry in the text; ascending.
        sums: float32 ``[batch, heads, entries]``, attention that each entry has received, where it is recorded.
        queries: the last queries ``[batch, query heads, w, width]``, where they are; None before any.
        scaling: of the layer's attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.empty(0, dtype=torch.long)
        self.sums = torch.empty(0)
        self.queries: Tensor | None = None
        self.scaling = 1.0

    def extend(self, keys: Tensor, values: Tensor, read: int) -> None:
        """Store the entries of the tokens from ``read`` on."""
        new = torch.arange(read, read + keys.shape[-2], device=keys.device).expand(keys.shape[:-1])
        if not self.is_initialized:
            self.positions, self.sums = new[..., :0], new.float()[..., :0]
        self.append(keys, values, None)
        self.positions = torch.cat([self.positions, new], -1)
        self.sums = torch.cat([self.sums, torch.zeros_like(new, dtype=torch.float32)], -1)

    def choose(self, entries: Tensor) -> None:
        """Keep only these entries, int64 ``[batch, heads, kept]``, ascending: copied, so that the rest is freed."""
        wide = entries[..., None].expand(*entries.shape, self.keys.shape[-1])
        tall = entries[..., None].expand(*entries.shape, self.values.shape[-1])
        self.replace(self.keys.gather(-2, wide), self.values.gather(-2, tall))
        self.positions, self.sums = self.positions.gather(-1, entries), self.sums.gather(-1, entries)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.positions = self.positions.repeat_interleave(repeats, dim=0)
        self.sums = self.sums.repeat_interleave(repeats, dim=0)
        if self.queries is not None:
            self.queries = self.queries.repeat_interleave(repeats, dim=0)


class PolicedCache(EvictingCache):
    """A cache of :class:`PolicedLayer`.

    Attributes:
        read: text tokens read before the coming forward pass.
        sinks: first entries that are read at the place before the others, as in StreamingLLM; 0 for none.
        speeds: angle per position of each pair of coordinates, for these.
    """

    layers: list[PolicedLayer]

    def __init__(self, sinks: int = 0, speeds: Tensor | None = None) -> None:
        super().__init__()
        self.read, self.sinks, self.speeds = 0, sinks, speeds

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what a layer computed; sinks are returned as if nothing lay between them and the others."""
        while len(self.layers) <= layer_idx:
            self.layers.append(PolicedLayer())
        layer = self.layers[layer_idx]
        before = layer.keys.shape[-2] if layer.is_initialized else 0
        layer.extend(key_states, value_states, self.read)
        gap = self.read - before
        if not self.sinks or self.speeds is None or gap <= 0:
            return layer.keys, layer.values
        # Rotations are relative: turning the sinks on by the gap is the same as counting all others back. They are
        # turned anew from what is stored, for rounding would add up.
        angle = (gap * self.speeds.to(layer.keys.device))[None]
        first = rotated(layer.keys[:, :, : self.sinks], angle.cos(), angle.sin())
        return torch.cat([first, layer.keys[:, :, self.sinks :]], -2), layer.values

    def mean_entries(self) -> float:
        """Entries held per row and head, over layers."""
        return sum(layer.keys.shape[-2] for layer in self.layers) / max(1, len(self.layers))

    def most_entries(self) -> int:
        return max((layer.keys.shape[-2] for layer in self.layers), default=0)
