"""Entries of a layer in another form than keys and values of one length, unpacked whenever they are attended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Packed(ABC):
    """Some of a layer's entries, older than those that are held as they are."""

    @abstractmethod
    def unpack(self, room: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, entries + room, width]``, made for one forward pass.

        Args:
            room: places behind the entries, to be written by the caller.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that is stored, scales and indices included."""

    @abstractmethod
    def repeated(self, repeats: int) -> Packed:
        """Each row that many times."""

    def after(self, earlier: tuple[Packed, ...]) -> tuple[Packed, ...]:
        """These entries behind earlier ones."""
        return (*earlier, self)


@dataclass(frozen=True)
class Ragged(Packed):
    """As many entries per row and head as each was given, one after the other: nothing is padded while it is stored.

    Attributes:
        keys, values: ``[sum of counts, width]``.
        counts: int64 ``[batch, heads]``.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, entries: Tensor) -> Ragged:
        """The ``entries`` int64 ``[batch, heads, n]`` of keys and values; -1 stands for none."""
        there = entries >= 0
        rows, heads, _ = torch.nonzero(there, as_tuple=True)
        places = entries[there]
        return cls(keys[rows, heads, places], values[rows, heads, places], there.sum(-1))

    def unpack(self, room: int = 0) -> tuple[Tensor, Tensor]:
        """Padded in front with zeros, so that the last entries of all heads stand side by side."""
        counts = self.counts.flatten().tolist()
        longest = max(counts)
        unpacked = []
        for flat in (self.keys, self.values):
            padded = flat.new_empty(len(counts), longest + room, flat.shape[-1])
            for row, part in zip(padded, torch.split(flat, counts), strict=True):
                row[: longest - len(part)] = 0
                row[longest - len(part) : longest] = part
            unpacked.append(padded.view(*self.counts.shape, longest + room, flat.shape[-1]))
        return unpacked[0], unpacked[1]

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]

    def repeated(self, repeats: int) -> Packed:
        keys, values = self.unpack()
        longest = keys.shape[2]
        places = torch.arange(longest, device=keys.device).expand(keys.shape[:3])
        entries = places.masked_fill(places < longest - self.counts[..., None], -1)
        again = [tensor.repeat_interleave(repeats, dim=0) for tensor in (keys, values, entries)]
        return Ragged.of(*again)


def with_room(tensor: Tensor, room: int) -> Tensor:
    """The entries, copied to where there is room behind them."""
    if not room:
        return tensor
    batch, heads, entries, width = tensor.shape
    wide = tensor.new_empty(batch, heads, entries + room, width)
    wide[:, :, :entries] = tensor
    return wide
