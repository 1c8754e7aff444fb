"""The interface of a session: a batch of texts in the cache of a compressed model, for any compression mechanism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Scored(NamedTuple):
    """Logits ``[batch, stop - start, vocabulary]``: predictions after each of the text tokens start .. stop - 1."""

    start: int
    stop: int
    logits: Tensor


class CacheBytes(NamedTuple):
    """Bytes of a cache, over all rows.

    Attributes:
        logical: bytes of the entries that are kept, by shape and dtype.
        physical: bytes of the storages that hold them.
        full: bytes of the context's entries, had none been removed.
    """

    logical: int
    physical: int
    full: int


class Session(Protocol):
    """A batch of texts of equal length that is read and continued under one method.

    Scoring, generation, profiles and the doctor use nothing but this interface. A context is read with ``prefill``; the
    text after it is either read with ``extend``, or generated with ``expand`` and ``step``.
    """

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        """Read the context and compress it.

        Args:
            ids: int64 ``[batch, n]``.
            first: first token whose logits are wanted; none are computed before it.
            ahead: int64 ``[batch, m]``, tokens after the context whose queries the method may use to choose what it
                keeps; most methods do not. They are not read yet.
        """

    def extend(self, ids: Tensor) -> Iterator[Scored]:
        """Read text ``[batch, m]`` after the context without compressing it further."""

    def expand(self, copies: int) -> None:
        """Repeat every row ``copies`` times, copies of a row next to each other."""

    def step(self, ids: Tensor) -> Tensor:
        """Read one generated token per row and return logits ``[rows, vocabulary]``; the method may remove entries.

        Args:
            ids: int64 ``[rows]``.
        """

    def fill(self, batch: int, seed: int) -> None:
        """Fill the cache with as many random entries as reading the context of a batch would have left."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    @property
    def kept(self) -> int:
        """Number of entries kept now, the mean over layers, heads and rows."""

    @property
    def attended(self) -> int:
        """Number of entries that the next token attends to, including dead ones that have not been overwritten yet."""

    @property
    def peak(self) -> int:
        """The most entries held at any time, including those of tokens being fed."""

    @property
    def removals(self) -> int:
        """Number of times that entries have been removed, or stored in another form."""

    def entries_by_head(self) -> list[list[float]]:
        """Entries held by every KV head of every layer, the mean over rows; packed ones count as their bytes."""

    def held_positions(self) -> list[Tensor] | None:
        """Which text tokens have entries: for each layer int64 ``[batch, KV heads, entries]``, -1 for none; None if
        entries are merged, stored in another form, or stand for several tokens."""

    def bytes(self) -> CacheBytes:
        """Bytes of the cache now."""

    def tensors(self) -> list[Tensor]:
        """All tensors that the cache holds."""

    def visible(self, queries: Tensor) -> Tensor:
        """How many earlier entries each query saw, ``[q]``; ``queries`` are indices of text tokens. For tokens that
        have not been read yet, an estimate."""

    def distance(self, targets: Tensor) -> Tensor | None:
        """Number of text tokens from the last place where entries were replaced to each target, int64 ``[q]``; -1
        before the first, None if the method replaces none."""
