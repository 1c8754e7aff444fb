"""Interface for entries that are stored in another form than plain keys and values, and unpacked to be attended."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class StoredEntries(ABC):
    """Entries of a layer in another form than plain keys and values, which hold the newer entries."""

    @abstractmethod
    def unpack(self, room: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, entries + room, width]``, for one forward pass.

        Args:
            room: spare entries at the end, to be written by the caller.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All stored tensors, scales and indices included."""

    @abstractmethod
    def repeated(self, repeats: int) -> StoredEntries:
        """A copy with each row repeated ``repeats`` times."""

    def after(self, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, ...]:
        """The earlier entries followed by these."""
        return (*earlier, self)


def with_room(tensor: Tensor, room: int) -> Tensor:
    """The entries followed by ``room`` uninitialised ones; the tensor itself if ``room`` is 0."""
    if not room:
        return tensor
    batch, heads, entries, width = tensor.shape
    wide = tensor.new_empty(batch, heads, entries + room, width)
    wide[:, :, :entries] = tensor
    return wide


def gather_entries(tensor: Tensor, entries: Tensor) -> Tensor:
    """Select ``entries``, int64 ``[batch, heads, kept]``, of ``[batch, heads, entries, width]``; whole vectors are
    copied, which is faster than ``torch.gather``."""
    rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None, None]
    heads = torch.arange(tensor.shape[1], device=tensor.device)[:, None]
    return tensor[rows, heads, entries].contiguous()
