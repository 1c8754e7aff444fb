"""The contexts of a sample, read under many cells."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import nn

from kvbench.cache.shape import cache_shape
from kvbench.execution.channel import CELL_ERRORS
from kvbench.inference.opening import ONEPASS, Text, open_session
from kvbench.inference.session import Session
from kvbench.inference.shared_context import SharedContext, can_share, keeps_whole
from kvbench.inference.together import can_join
from kvbench.protocols.answer import TOGETHER, AnswerProtocol, needed
from kvbench.protocols.pieces import Cut, Piece

if TYPE_CHECKING:
    from kvbench.execution.worker import PreparedCell

ROWS = 64
"""Number of cells that answer together, at most."""
BYTES = 2 << 30
"""Bytes that their full caches may take together, at most."""


class Contexts:
    """The contexts of a sample: each is read once for all policies that can share it.

    Attributes:
        group: unit that the bootstrap resamples.
        cells: all that read them.
        pieces: the questions, by context and in their order.
        sharing: cells that share the forward pass over a context.
        joining: those of them that also write their answers together.
    """

    def __init__(
        self, model: nn.Module, protocol: AnswerProtocol, group: str, cut: Cut, prepared_cells: Sequence[PreparedCell]
    ) -> None:
        self.model, self.protocol, self.group, self.cut = model, protocol, group, cut
        self.pieces: dict[tuple[int, ...], list[Piece]] = {}
        first = cut.pieces[0]
        for piece in cut.pieces:
            # In turns only the context of the first question is read, though tokens may reach into another question.
            asked = first if protocol.turns == TOGETHER else piece
            self.pieces.setdefault(asked.ids[: asked.context], []).append(piece)
        self.shared: dict[tuple[int, ...], SharedContext] = {}
        self.cells = list(prepared_cells)
        context = first.ids[: first.context]
        opened = [(one, self._opened(context, one)) for one in prepared_cells if _can_share(one)]
        self.sharing = [one for one, session in opened if can_share(session)]
        if self.sharing:
            self.sharing += [one for one, session in opened if keeps_whole(session)]
        self.joining = [
            one for one, session in opened
            if can_share(session) and can_join(session) and protocol.turns != TOGETHER  # answers differ in length
        ]

    def groups(self) -> list[list[PreparedCell]]:
        """Cells that read and answer together: those that share, as many as memory has room for; others alone."""
        entry_bytes = cache_shape(self.model).entry_bytes
        longest = max(map(self.length, self.pieces))
        size = max(1, min(ROWS, BYTES // (longest * entry_bytes)))
        together = [one for one in self.cells if one in self.joining]
        alone = [[one] for one in self.cells if one not in self.joining]
        return [*alone, *(together[start : start + size] for start in range(0, len(together), size))]

    def length(self, context: tuple[int, ...]) -> int:
        """Tokens of a context with its longest question and answer, or with all of them if they are asked in turns."""
        return needed(self.pieces[context])

    def read(self, context: tuple[int, ...], prepared_cell: PreparedCell) -> Session:
        """A session that has read a context and compressed it; the model is prepared for it."""
        if prepared_cell in self.sharing:
            with suppress(*CELL_ERRORS):  # of another cell, perhaps: then each reads for itself
                return self._shared(context, prepared_cell)
        session = self._opened(context, prepared_cell)
        for _ in session.prefill(torch.tensor([context], device=session.device), len(context)):
            pass
        return session

    def _shared(self, context: tuple[int, ...], prepared_cell: PreparedCell) -> Session:
        session = self._opened(context, prepared_cell)
        if context not in self.shared:
            ids = torch.tensor([context], device=session.device)
            self.shared[context] = SharedContext(self.model, ids, [self._opened(context, one) for one in self.sharing])
        self.shared[context].read_into(session)
        return session

    def _opened(self, context: tuple[int, ...], prepared_cell: PreparedCell) -> Session:
        cell = prepared_cell.cell
        return open_session(
            self.model, prepared_cell.method, Text(len(context), len(context), (self.cut.pieces[0].layout,), True),
            adapter=prepared_cell.adapter, seed=cell.seed, execution=cell.execution, chunk=self.protocol.chunk,
            at_once=True,
        )


def _can_share(prepared_cell: PreparedCell) -> bool:
    """Whether a cell reads with the base model, in the execution that removes entries; its session says the rest."""
    return prepared_cell.adapter is None and prepared_cell.cell.execution != ONEPASS
