"""Entries of a layer in another form than keys and values of one length, unpacked whenever they are attended."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class StoredEntries(ABC):
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
    def repeated(self, repeats: int) -> StoredEntries:
        """Each row that many times."""

    def after(self, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, ...]:
        """These entries behind earlier ones."""
        return (*earlier, self)


def with_room(tensor: Tensor, room: int) -> Tensor:
    """The entries, copied to where there is room behind them."""
    if not room:
        return tensor
    batch, heads, entries, width = tensor.shape
    wide = tensor.new_empty(batch, heads, entries + room, width)
    wide[:, :, :entries] = tensor
    return wide


def gather_entries(tensor: Tensor, entries: Tensor) -> Tensor:
    """``[batch, heads, kept, width]`` of ``[batch, heads, entries, width]``: whole rows are copied, which is faster
    than to gather number by number."""
    rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None, None]
    heads = torch.arange(tensor.shape[1], device=tensor.device)[:, None]
    return tensor[rows, heads, entries].contiguous()
