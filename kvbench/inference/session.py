"""A session: a batch of texts in the cache of a compressed model, whatever the mechanism that compresses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Scored(NamedTuple):
    """Logits ``[batch, stop - start, vocabulary]`` after the text tokens start .. stop - 1."""

    start: int
    stop: int
    logits: Tensor


class CacheBytes(NamedTuple):
    """Bytes of a cache, of all rows.

    Attributes:
        logical: of the entries that are kept, by their shape and type.
        physical: of the storages that hold them.
        full: of the context's entries, had none been removed.
    """

    logical: int
    physical: int
    full: int


class Session(Protocol):
    """A batch of texts of equal length being read, and written on, under one method.

    It is all that scoring, generation, profiles and the doctor know of a mechanism. A context is read with
    ``prefill``; what follows it is either read with ``extend``, or written with ``expand`` and ``step``.
    """

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        """Read the context and compress it.

        Args:
            ids: int64 ``[batch, n]``.
            first: token from which on logits are wanted; before it none are computed.
            ahead: int64 ``[batch, m]``, tokens after the context that the method may look at when it chooses what
                stays; most do not. They are not yet read by it.
        """

    def extend(self, ids: Tensor) -> Iterator[Scored]:
        """Read on behind the context, ``[batch, m]``, without compressing further."""

    def expand(self, copies: int) -> None:
        """Repeat every row that many times, side by side."""

    def step(self, ids: Tensor) -> Tensor:
        """Read one written token of every row: logits ``[rows, vocabulary]``; entries leave as the method says.

        Args:
            ids: int64 ``[rows]``.
        """

    def fill(self, batch: int, seed: int) -> None:
        """Put random entries where reading the context of a batch would have left some."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    @property
    def kept(self) -> int:
        """Entries that are kept now, per layer, head and row on average."""

    @property
    def attended(self) -> int:
        """Entries that the next token attends; those that wait to be overwritten included."""

    @property
    def peak(self) -> int:
        """The most entries there ever were at once, what was being fed included."""

    def bytes(self) -> CacheBytes:
        """Of the cache now."""

    def tensors(self) -> list[Tensor]:
        """All that the cache holds."""

    def visible(self, queries: Tensor) -> Tensor:
        """How many earlier entries each query (numbers of text tokens) saw, ``[q]``; for those not yet read, as far
        as it is known."""

    def distance(self, targets: Tensor) -> Tensor | None:
        """Text tokens from the last place where entries were replaced to each target, int64 ``[q]``; -1 before the
        first, None where the method replaces none."""
