"""Entries whose keys have fewer channels (ThinK, arXiv 2407.21018)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbench.cache.stored import StoredEntries, with_room


@dataclass(frozen=True)
class PrunedChannels(StoredEntries):
    """Keys without the pruned channels, which are zero when they are attended; values are whole.

    A channel that is zero in the key adds nothing to the logits, so this equals removing the channel from the
    query as well.

    Attributes:
        keys: ``[batch, heads, entries, channels left]``.
        values: ``[batch, heads, entries, width]``.
        channels: int16 ``[batch, heads, channels left]``, their indices in a whole key.
        width: number of channels of a whole key.
    """

    keys: Tensor
    values: Tensor
    channels: Tensor
    width: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, channels: Tensor) -> PrunedChannels:
        """Keep only the ``channels``, int64 ``[batch, heads, channels left]``, of the keys."""
        index = channels[:, :, None].expand(*keys.shape[:3], channels.shape[-1])
        return cls(keys.gather(-1, index), values.clone(), channels.to(torch.int16), keys.shape[-1])

    def unpack(self, room: int = 0) -> tuple[Tensor, Tensor]:
        index = self.channels.long()[:, :, None].expand(self.keys.shape)
        batch, heads, entries, _ = self.keys.shape
        whole = self.keys.new_zeros(batch, heads, entries + room, self.width)
        whole[:, :, :entries].scatter_(-1, index, self.keys)
        return whole, with_room(self.values, room)

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.channels]

    def repeated(self, repeats: int) -> StoredEntries:
        keys, values, channels = (
            t.repeat_interleave(repeats, dim=0) for t in (self.keys, self.values, self.channels)
        )
        return replace(self, keys=keys, values=values, channels=channels)
