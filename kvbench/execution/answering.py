"""Answers the questions of a window of samples under every cell.

Each context is read once for all policies that compress it at its end, and the answers behind it are written together,
one row for each policy and ratio, so that the weights are read once for a token of all of them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from kvbench.data.documents import Document
from kvbench.execution.channel import CELL_ERRORS, Advanced, At
from kvbench.execution.contexts import Contexts
from kvbench.execution.evidence import Spans, Survival, kept_of
from kvbench.execution.writing import Ends, Written, write_answers
from kvbench.inference.opening import prepared
from kvbench.inference.session import Session
from kvbench.protocols.answer import LINE, TOGETHER, AnswerProtocol
from kvbench.protocols.pieces import Cut, Piece
from kvbench.store.answer_records import Answer, AnswerRecord
from kvbench.store.records import Cell

if TYPE_CHECKING:
    from kvbench.execution.worker import PreparedCell, Worker


def answer_window(
    worker: Worker, cells: Sequence[Cell], protocol: AnswerProtocol, documents: Sequence[tuple[Document, Cut]],
    done: dict[str, set[str]],
) -> None:
    """Answer and record what is not on disk yet; an error affects only its own cell."""
    ends = Ends(worker.loaded, protocol.stop == LINE)
    for document, cut in documents:
        todo = [
            cell for cell in cells if document.id not in done.get(cell.key, ()) and cell.key not in worker.failed
        ]
        prepared_cells = [worker.prepared_cells[cell.key] for cell in todo]
        reading = Contexts(worker.loaded.model, protocol, document.group, cut, prepared_cells)
        tokens = sum(len(piece.ids) for piece in cut.pieces)
        worker.say(Advanced(tokens * (len(cells) - len(todo))))
        for group in reading.groups():
            worker.say(At(group[0].cell.key))
            _record_group(worker, reading, group, ends)
            worker.say(Advanced(tokens * len(group)))


def _record_group(worker: Worker, reading: Contexts, group: Sequence[PreparedCell], ends: Ends) -> None:
    """Answer for a group of cells; if that fails for one of them, for each alone."""
    if len(group) > 1:
        with suppress(*CELL_ERRORS):
            for prepared_cell, record in zip(group, answer_group(reading, group, ends), strict=True):
                worker.record(prepared_cell.cell, [record])
            return
    for prepared_cell in group:
        with worker.guarded(prepared_cell.cell):
            worker.record(prepared_cell.cell, answer_group(reading, [prepared_cell], ends))


class _Cell:
    """What is known of a cell while the contexts of a sample are read and asked, one after the other."""

    def __init__(self) -> None:
        self.answers: dict[int, Answer] = {}
        self.contexts = self.raw = self.held = self.peak = 0
        self.logical = self.physical = self.full = 0
        self.survival: Survival | None = None
        self.spans: Spans | None = None

    def add(self, session: Session, piece: Piece) -> None:
        """Account for a context that has been read; ``piece`` is the first question about it."""
        if not self.contexts:
            self.survival, self.spans = kept_of(session, piece)
        size = session.bytes()
        self.contexts, self.raw, self.held = self.contexts + 1, self.raw + piece.context, self.held + session.kept
        self.peak, self.logical = max(self.peak, session.peak), self.logical + size.logical
        self.physical, self.full = self.physical + size.physical, self.full + size.full

    def record(self, first: Piece, group: str, seconds: float) -> AnswerRecord:
        return AnswerRecord(
            first.document, group, tuple(answer for _, answer in sorted(self.answers.items())),
            self.contexts, self.raw, self.held, self.peak, self.logical, self.physical, self.full,
            self.survival, self.spans, first.bin, round(seconds, 4),
        )


def answer_group(reading: Contexts, group: Sequence[PreparedCell], ends: Ends) -> list[AnswerRecord]:
    """Compress every context of a sample for a group of cells, and answer the questions behind it."""
    started, pieces = time.perf_counter(), reading.cut.pieces
    is_session = reading.protocol.turns == TOGETHER
    found = [_Cell() for _ in group]
    for context, asked in reading.pieces.items():
        with torch.inference_mode(), prepared(reading.model, group[0].adapter, reading.length(context)):
            sessions = [reading.read(context, prepared_cell) for prepared_cell in group]
            for cell, session in zip(found, sessions, strict=True):
                cell.add(session, asked[0])
            before: list[Written] = []
            for number, piece in enumerate(pieces):
                if piece in asked:
                    is_last = piece is asked[-1]
                    copies = sessions if is_session or is_last else [_copied(session) for session in sessions]
                    written = write_answers(reading.model, copies, piece, ends, before)
                    before = written if is_session else []
                    for cell, one in zip(found, written, strict=True):
                        cell.answers[number] = one.answer
    seconds = (time.perf_counter() - started) / len(group)
    return [cell.record(pieces[0], reading.group, seconds) for cell in found]


def _copied(session: Session) -> Session:
    """A copy of a session that shares with it the model, and all else that is constant."""
    parts = {name: getattr(session, name, None) for name in ("model", "policy", "reader", "layout")}
    return copy.deepcopy(session, {id(part): part for part in parts.values() if part is not None})
