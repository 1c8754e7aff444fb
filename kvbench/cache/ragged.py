"""Storage for heads with different numbers of entries: flat tensors, one head after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

ROOM = 32
"""When entries are appended, a head gets spare room for 1 / ROOM of its entries."""


class Ragged:
    """Different numbers of entries per row and head, stored and attended without padding.

    Attributes:
        keys, values: ``[slots, width]``, all heads of the first row, then those of the second, and so on.
        starts, counts: first slot and number of entries of every row and head, in the same order.
        heads: number of heads in a row.
    """

    def __init__(self, keys: Tensor, values: Tensor, starts: list[int], counts: list[int], heads: int) -> None:
        self.keys, self.values, self.starts, self.counts, self.heads = keys, values, starts, counts, heads

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, entries: Tensor) -> Ragged:
        """Gather the ``entries``, int64 ``[batch, heads, n]``, of keys and values; -1 stands for none."""
        there = entries >= 0
        rows, heads, _ = torch.nonzero(there, as_tuple=True)
        places, counts = entries[there], there.sum(-1).flatten()
        starts = (counts.cumsum(0) - counts).tolist()
        return cls(keys[rows, heads, places], values[rows, heads, places], starts, counts.tolist(), entries.shape[1])

    @property
    def longest(self) -> int:
        return max(self.counts)

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the keys and values ``[entries, width]`` of every row and head."""
        for start, count in zip(self.starts, self.counts, strict=True):
            yield self.keys[start : start + count], self.values[start : start + count]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append entries ``[batch, heads, m, width]`` to every head, in place if there is room."""
        m = keys.shape[2]
        ends = [*self.starts[1:], len(self.keys)]
        if any(start + count + m > end for start, count, end in zip(self.starts, self.counts, ends, strict=True)):
            self._make_room(m)
        for place, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            row, head = divmod(place, self.heads)
            for flat, new in ((self.keys, keys), (self.values, values)):
                flat[start + count : start + count + m] = new[row, head]
        self.counts = [count + m for count in self.counts]

    def _make_room(self, m: int) -> None:
        sizes = [count + m + count // ROOM for count in self.counts]
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        keys, values = (flat.new_empty(sum(sizes), flat.shape[-1]) for flat in (self.keys, self.values))
        for start, (old_keys, old_values) in zip(starts, self.parts(), strict=True):
            keys[start : start + len(old_keys)], values[start : start + len(old_values)] = old_keys, old_values
        self.keys, self.values, self.starts = keys, values, starts

    def attention(self, query: Tensor, scaling: float | None) -> Tensor:
        """Causal attention of the last q tokens, ``[batch, query heads, q, width]``, each head over its own entries."""
        batch, query_heads, q, _ = query.shape
        group = query_heads // self.heads
        out = query.new_empty(batch, query_heads, q, self.values.shape[-1])
        for place, (keys, values) in enumerate(self.parts()):
            row, head = divmod(place, self.heads)
            mine = slice(head * group, (head + 1) * group)
            mask = None
            if q > 1:
                mask = torch.ones(q, len(keys), dtype=torch.bool, device=query.device).tril(len(keys) - q)
            out[row : row + 1, mine] = functional.scaled_dot_product_attention(
                query[row : row + 1, mine], keys[None, None], values[None, None], attn_mask=mask, scale=scaling,
                enable_gqa=group > 1,
            )
        return out

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, longest, width]``, with zeros in front of heads with fewer entries."""
        shape = len(self.counts), self.longest
        unpacked = [flat.new_zeros(*shape, flat.shape[-1]) for flat in (self.keys, self.values)]
        for place, part in enumerate(self.parts()):
            for padded, flat in zip(unpacked, part, strict=True):
                padded[place, self.longest - len(flat) :] = flat
        keys, values = (padded.view(-1, self.heads, *padded.shape[1:]) for padded in unpacked)
        return keys, values

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts() for tensor in part]

    def repeated(self, repeats: int) -> Ragged:
        keys, values = self.unpack()
        counts = torch.tensor(self.counts, device=keys.device).view(-1, self.heads, 1)
        places = torch.arange(self.longest, device=keys.device).expand(keys.shape[:3])
        entries = places.masked_fill(places < self.longest - counts, -1)
        return Ragged.of(*(tensor.repeat_interleave(repeats, dim=0) for tensor in (keys, values, entries)))
