"""Sessions of memories: a layout whose special tokens are fed rows that a writer makes while text is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.cache.evicting import storage_bytes
from kvbench.inference.layout_session import LayoutSession, MaskedSession
from kvbench.inference.session import CacheBytes, Scored
from kvbench.methods.memories.writer import State


def _nothing() -> Tensor:
    return torch.empty(0, 0, 0)


@dataclass
class MemorySession(LayoutSession):
    """As its base; the memory of a chunk is written when the first of its slots is about to be fed.

    What is held besides entries is counted: the writer's state, ids of text that is still to be written from, and rows
    that are still to be fed.

    Attributes:
        state: what the writer carries from chunk to chunk.
        written: number of chunks that have been written.
        pending: int64 ``[batch, t]``, the ids of the text behind them; none where no more is written.
        rows: ``[batch, rows, width]``, memory that has been written and not been fed yet.
    """

    state: State = ()
    written: int = 0
    pending: Tensor = field(default_factory=_nothing)
    rows: Tensor = field(default_factory=_nothing)

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        self.pending, self.written, self.rows = ids, 0, _nothing()
        with self.reader.overhead():
            self.state = self.reader.begin(len(ids))
        yield from super().prefill(ids, max(first, self.layout.unread), ahead)
        self._await(ids)

    def _await(self, ids: Tensor) -> None:
        """Keep of a context what the chunk that is open at its end is written from, if text is written on."""
        goes_on = self.layout.n_raw > self.context
        self.pending = ids[:, sum(self.layout.written[: self.written]) if goes_on else ids.shape[1] :].clone()

    def inputs(self, ids: Tensor, slots: slice) -> Tensor:
        return self.reader.inputs(ids, self.layout, slots, self._special(slots))

    def generated_inputs(self, ids: Tensor, slots: slice) -> Tensor:
        self.pending = torch.cat([self.pending, ids], 1)
        return self.reader.generated_inputs(ids, self.layout, slots, self._special(slots))

    def _special(self, slots: slice) -> Tensor | None:
        """What is fed at the special tokens among these slots, ``[batch, slots, width]``; None if there are none."""
        row = self.layout.tokens.row[slots]
        if not bool((row >= 0).any()):
            return None
        with self.reader.overhead():
            lengths, per_chunk = self.layout.written, self.layout.rows_per_chunk
            given = self.written * per_chunk - self.rows.shape[1]  # rows that have been fed
            stop = int(row.max()) // per_chunk + 1
            if stop > self.written:
                new, self.state = self.reader.write(self.pending, lengths[self.written : stop], self.state)
                self.rows = torch.cat([self.rows, new], 1) if self.rows.shape[1] else new
                self.pending = self.pending[:, sum(lengths[self.written : stop]) :].clone()
                self.written = stop
            fed = self.rows[:, (row - given).clamp(min=0).to(self.rows.device)]
            self.rows = self.rows[:, int(row.max()) + 1 - given :].clone()
            return fed

    def expand(self, copies: int) -> None:
        super().expand(copies)
        self.state = tuple(one.repeat_interleave(copies, 0) for one in self.state)
        self.pending, self.rows = (one.repeat_interleave(copies, 0) for one in (self.pending, self.rows))

    def fill(self, batch: int, seed: int) -> None:
        super().fill(batch, seed)
        ids = torch.zeros(batch, self.context, dtype=torch.long, device=self.device)
        row = self.layout.tokens.row[: self.fed]
        self.written = int(row.max() + 1) // self.layout.rows_per_chunk
        self.state = self.reader.begin(batch)
        if self.state and self.written:  # of the size that it has after the context
            _, self.state = self.reader.write(ids, self.layout.written[: self.written], self.state)
        self._await(ids)

    def bytes(self) -> CacheBytes:
        return _with(super().bytes(), self._besides())

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self._besides()]

    def _besides(self) -> list[Tensor]:
        """What is held besides entries."""
        return [one for one in (*self.state, self.pending, self.rows) if one.numel()]


@dataclass
class MaskedMemorySession(MaskedSession):
    """One masked pass over a context whose memory is written at once.

    Attributes:
        state: what the writer would carry on; it is counted.
    """

    state: State = ()

    def special(self, ids: Tensor) -> Tensor:
        rows, self.state = self.reader.write(ids, self.layout.written, self.reader.begin(len(ids)))
        return rows[:, self.layout.tokens.row.clamp(min=0).to(ids.device)]

    def bytes(self) -> CacheBytes:
        return _with(super().bytes(), list(self.state))

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.state]


def _with(found: CacheBytes, besides: list[Tensor]) -> CacheBytes:
    logical = sum(one.numel() * one.element_size() for one in besides)
    return found._replace(logical=found.logical + logical, physical=found.physical + storage_bytes(besides))
