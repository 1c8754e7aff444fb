"""Rows of a batch that share a session, and what caches hold for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvbench.inference.session import Session
from kvbench.inference.together import repeated


@dataclass(frozen=True)
class CacheUsage:
    """What a cache holds, over all its rows.

    Attributes:
        rows: number of texts.
        tokens: read so far, without padding.
        entries: held, the mean over layers and heads; packed ones count as their bytes.
        by_head: entries held per row, by layer and KV head.
        removals: how often entries were removed, at most in a row.
        logical, physical: bytes of what is held, by shapes and by storages; ``full`` of an entry for every token.
    """

    rows: int
    tokens: int
    entries: float
    by_head: tuple[tuple[float, ...], ...]
    removals: int
    logical: int
    physical: int
    full: int

    @classmethod
    def over(cls, parts: Sequence[CacheUsage]) -> CacheUsage:
        """What several caches hold together."""
        rows = sum(part.rows for part in parts)
        by_head = tuple(
            tuple(sum(part.rows * held for part, held in zip(parts, heads, strict=True)) / rows for heads in zip(
                *layers, strict=True
            ))
            for layers in zip(*(part.by_head for part in parts), strict=True)
        )
        return cls(
            rows, sum(part.tokens for part in parts), sum(part.entries for part in parts), by_head,
            max(part.removals for part in parts), sum(part.logical for part in parts),
            sum(part.physical for part in parts), sum(part.full for part in parts),
        )


@dataclass
class RowGroup:
    """Rows of a batch that are read together, and their session.

    Attributes:
        length: tokens of the context of each row; ``seeds`` a number that depends on its text only.
    """

    rows: Tensor
    session: Session
    length: int
    seeds: tuple[int, ...]

    def expand(self, copies: int) -> None:
        """Repeat every row, copies of a row next to each other, in the batch and in the session."""
        self.session.expand(copies)
        self.rows = repeated(self.rows, copies)
        self.seeds = tuple(seed for seed in self.seeds for _ in range(copies))

    def usage(self, generated: int) -> CacheUsage:
        """What is held for these rows.

        Args:
            generated: tokens of each row that have been read after its context.
        """
        held, rows = self.session.bytes(), len(self.rows)
        entry = held.full / self.length  # of one entry in every row
        tokens = self.length + generated
        return CacheUsage(
            rows, rows * tokens, rows * held.logical / entry, tuple(map(tuple, self.session.entries_by_head())),
            self.session.removals, held.logical, held.physical, round(entry * tokens),
        )
