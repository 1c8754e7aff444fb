"""Sessions of memories: a layout whose special tokens are fed rows that a writer makes while text is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.session import CacheBytes, Scored
from kvbench.methods.memories.writer import State

_NONE = torch.empty(0)


@dataclass
class MemorySession(LayoutSession):
    """As its base; the memory of a chunk is written when the first of its slots is about to be fed.

    Attributes:
        state: what the writer carries from chunk to chunk; it is held, and counted.
        written: number of chunks that have been written.
        pending: int64 ``[batch, t]``, the ids of the text behind them.
        rows: ``[batch, rows, width]``, memory that has been written and may not have been fed yet.
        given: number of rows of memory before these.
    """

    state: State = ()
    written: int = 0
    pending: Tensor = _NONE
    rows: Tensor = field(default_factory=lambda: _NONE[None, None])
    given: int = 0

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        self.pending, self.written = ids, 0
        with self.reader.overhead():
            self.state = self.reader.begin(len(ids))
        yield from super().prefill(ids, max(first, self.layout.unread), ahead)

    def inputs(self, ids: Tensor, slots: slice) -> Tensor:
        return self.reader.inputs(ids, self.layout, slots, self._special(slots))

    def generated_inputs(self, ids: Tensor, slots: slice) -> Tensor:
        self.pending = torch.cat([self.pending, ids], 1)
        return self.reader.generated_inputs(ids, self.layout, slots, self._special(slots))

    def _special(self, slots: slice) -> Tensor | None:
        """What is fed at the special tokens among these slots, ``[batch, slots, width]``; None if there are none."""
        wanted = self.layout.tokens.row[slots]
        if not bool((wanted >= 0).any()):
            return None
        with self.reader.overhead():
            lengths = self.layout.written
            per_chunk = int(self.layout.tokens.row.max() + 1) // len(lengths)
            stop = int(wanted.max()) // per_chunk + 1
            if stop > self.written:
                unfed = int(wanted[wanted >= 0].min()) < self.written * per_chunk
                before = self.rows if unfed else self.rows[:, :0]
                new, self.state = self.reader.write(self.pending, lengths[self.written : stop], self.state)
                self.given = self.written * per_chunk - before.shape[1]
                self.rows = torch.cat([before, new], 1) if unfed else new
                self.pending = self.pending[:, sum(lengths[self.written : stop]) :]
                self.written = stop
            return self.rows[:, (wanted - self.given).clamp(min=0).to(self.rows.device)]

    def expand(self, copies: int) -> None:
        super().expand(copies)
        self.state = tuple(one.repeat_interleave(copies, 0) for one in self.state)
        self.pending, self.rows = (one.repeat_interleave(copies, 0) for one in (self.pending, self.rows))

    def fill(self, batch: int, seed: int) -> None:
        super().fill(batch, seed)
        ids = torch.zeros(batch, self.context, dtype=torch.long, device=self.device)
        fed = self.layout.tokens.row[: self.fed]
        lengths = self.layout.written
        per_chunk = int(self.layout.tokens.row.max() + 1) // len(lengths)
        self.written = int(fed.max() + 1) // per_chunk
        self.state = self.reader.begin(batch)
        if self.state and self.written:  # of the size that it has after the context
            _, self.state = self.reader.write(ids, lengths[: self.written], self.state)
        self.pending = ids[:, sum(lengths[: self.written]) :]

    def bytes(self) -> CacheBytes:
        found = super().bytes()
        logical = sum(one.numel() * one.element_size() for one in self.state)
        physical = sum(one.untyped_storage().nbytes() for one in self.state)
        return found._replace(logical=found.logical + logical, physical=found.physical + physical)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.state]
