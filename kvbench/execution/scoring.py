"""Scores a window of documents under every cell: how well their text is predicted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from kvbench.data.documents import Document
from kvbench.execution.accumulator import DocumentAccumulator
from kvbench.execution.channel import CELL_ERRORS, Advanced, At
from kvbench.execution.workload import batches
from kvbench.inference.opening import rows_together
from kvbench.inference.shared_context import SharedContext
from kvbench.methods import Method
from kvbench.protocols.pieces import Cut, Piece
from kvbench.protocols.scoring import BatchScore, Reference, score_pieces, share_context
from kvbench.store.records import Cell

if TYPE_CHECKING:
    from kvbench.execution.worker import Worker

Pending = dict[tuple[str, str], DocumentAccumulator]
"""By cell and document what is known of the pieces that were scored so far."""


def score_window(
    worker: Worker, cells: Sequence[Cell], documents: tuple[tuple[Document, Cut], ...], done: dict[str, set[str]]
) -> None:
    """Score and record what is not on disk yet; an error affects only its own cell."""
    pending = {
        (cell.key, document.id): DocumentAccumulator(document, cut)
        for cell in cells for document, cut in documents
        if document.id not in done.get(cell.key, ())
    }
    for batch in batches(documents, worker.loaded.vocabulary):
        todo = [c for c in cells if any((c.key, p.document) in pending for p in batch)]
        needs_full = any(cell.method != "full" for cell in todo)
        tokens, reference = sum(len(p.ids) for p in batch), None
        shared, sharing = _shared(worker, todo, batch)
        for cell in cells:
            wanted = cell in todo or (cell.method == "full" and needs_full)
            if wanted and cell.key not in worker.failed:
                worker.say(At(cell.key))
                kept = _measure(worker, cell, batch, reference, pending, shared if cell.key in sharing else None)
                reference = reference or kept
            worker.say(Advanced(tokens))


def _shared(worker: Worker, cells: Sequence[Cell], batch: list[Piece]) -> tuple[SharedContext | None, set[str]]:
    """The contexts of a batch that several of the cells read together, and the keys of these cells."""
    layouts = [piece.layout for piece in batch]
    alike = [
        one for one in (worker.prepared_cells[cell.key] for cell in cells if cell.key not in worker.failed)
        if one.adapter is None and one.cell.execution == "streamed" and len(rows_together(one.method, layouts)) == 1
    ]
    shared: SharedContext | None = None
    methods: list[Method] = []
    if len(alike) > 1:
        with suppress(*CELL_ERRORS):  # whoever cannot be opened fails by itself
            shared, methods = share_context(
                worker.loaded.model, [one.method for one in alike], batch,
                chunk=int(alike[0].cell.options["chunk"]), seed=alike[0].cell.seed,
            )
    return shared, {one.cell.key for one in alike if one.method in methods}


def _measure(
    worker: Worker, cell: Cell, batch: list[Piece], reference: Reference | None, pending: Pending,
    shared: SharedContext | None,
) -> Reference | None:
    """Score a batch under one cell and send the complete records; an error affects only this cell.

    Args:
        shared: the contexts of the batch, if others read them as well.

    Returns:
        The full cache's predictions, to compare the other methods with; None for other methods.
    """
    prepared_cell = worker.prepared_cells[cell.key]
    is_full, kept = cell.method == "full", None
    with worker.guarded(cell):
        for rows in rows_together(prepared_cell.method, [piece.layout for piece in batch]):
            pieces = [batch[row] for row in rows]
            started = time.perf_counter()
            theirs, chunk = reference.rows(rows) if reference else None, int(cell.options["chunk"])
            score, kept = score_pieces(
                worker.loaded.model, prepared_cell.method, pieces, theirs, adapter=prepared_cell.adapter,
                execution=cell.execution, chunk=chunk, seed=cell.seed, keep_reference=is_full, shared=shared,
            )
            _store(worker, cell, pieces, score, pending, time.perf_counter() - started)
    return kept


def _store(
    worker: Worker, cell: Cell, batch: list[Piece], score: BatchScore, pending: Pending, seconds: float
) -> None:
    finished = []
    for row, piece in enumerate(batch):
        entry = pending.get((cell.key, piece.document))
        if entry is None:
            continue
        entry.add(piece, score, row, len(batch), seconds)
        if entry.complete:
            finished.append(entry.record())
            del pending[cell.key, piece.document]
    worker.record(cell, finished)
