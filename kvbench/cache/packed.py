"""Entries of a layer in another form than keys and values of one length, unpacked whenever they are attended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Packed(ABC):
    """Some of a layer's entries, older than those that are held as they are."""

    @abstractmethod
    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, entries, width]``, made for one forward pass."""

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

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Padded in front with zeros, so that the last entries of all heads stand side by side."""
        keys, values = (self._padded(tensor) for tensor in (self.keys, self.values))
        return keys, values

    def _padded(self, flat: Tensor) -> Tensor:
        parts = torch.split(flat, self.counts.flatten().tolist())
        padded: Tensor = pad_sequence(list(parts), batch_first=True, padding_side="left")
        return padded.reshape(*self.counts.shape, *padded.shape[1:])

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]

    def repeated(self, repeats: int) -> Packed:
        keys, values = self.unpack()
        longest = keys.shape[2]
        places = torch.arange(longest, device=keys.device).expand(keys.shape[:3])
        entries = places.masked_fill(places < longest - self.counts[..., None], -1)
        again = [tensor.repeat_interleave(repeats, dim=0) for tensor in (keys, values, entries)]
        return Ragged.of(*again)
