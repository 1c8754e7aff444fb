"""Answers the questions of a window of samples under every cell."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbench.data.documents import Document
from kvbench.data.samples.sample import EVIDENCE
from kvbench.data.samples.scoring import SCORING
from kvbench.execution.channel import Advanced, At
from kvbench.inference.opening import ONEPASS, Text, open_session, prepared
from kvbench.inference.session import CacheBytes, Session
from kvbench.inference.shared_context import SharedContext
from kvbench.models.loading import Loaded, end_tokens
from kvbench.protocols.answer import LINE, AnswerProtocol
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
        reading = Contexts(worker, protocol, cut, [worker.prepared_cells[cell.key] for cell in todo])
        for cell in cells:
            if cell in todo:
                worker.say(At(cell.key))
                with worker.guarded(cell):
                    worker.record(cell, [_answered(reading, worker.prepared_cells[cell.key], ends)])
            worker.say(Advanced(sum(len(piece.ids) for piece in cut.pieces)))


class Contexts:
    """The contexts of a sample: each is read once for all policies that can share it.

    Attributes:
        pieces: the questions, by context and in their order.
    """

    def __init__(
        self, worker: Worker, protocol: AnswerProtocol, cut: Cut, prepared_cells: Sequence[PreparedCell]
    ) -> None:
        self.model, self.protocol, self.cut = worker.loaded.model, protocol, cut
        self.pieces: dict[tuple[int, ...], list[Piece]] = {}
        for piece in cut.pieces:
            self.pieces.setdefault(piece.ids[: piece.context], []).append(piece)
        self.shared: dict[tuple[int, ...], SharedContext] = {}
        self.prepared_cells = prepared_cells

    def length(self, context: tuple[int, ...]) -> int:
        """Tokens of a context with its longest question and answer."""
        return max(
            len(piece.ids) + piece.asked.new_tokens for piece in self.pieces[context] if piece.asked is not None
        )

    def read(self, context: tuple[int, ...], prepared_cell: PreparedCell) -> Session:
        """A session that has read a context and compressed it; the model is prepared for it."""
        session = self._opened(context, prepared_cell)
        ids = torch.tensor([context], device=session.device)
        if not _can_share(prepared_cell):
            for _ in session.prefill(ids, len(context)):
                pass
            return session
        if context not in self.shared:
            alike = [one for one in self.prepared_cells if _can_share(one)]
            self.shared[context] = SharedContext(self.model, ids, [self._opened(context, one) for one in alike])
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
    """Whether a cell reads with the base model, entries removed; its session says the rest."""
    return prepared_cell.adapter is None and prepared_cell.cell.execution != ONEPASS


class Ends:
    """Where answers end: at an end token, and with the first line if so asked."""

    def __init__(self, loaded: Loaded, with_line: bool) -> None:
        self.loaded, self.with_line, self.ends = loaded, with_line, set(end_tokens(loaded))

    @cached_property
    def line_tokens(self) -> set[int]:
        """Tokens that contain the end of a line."""
        hf = self.loaded.tokenizer
        texts = hf.batch_decode([[number] for number in range(self.loaded.vocabulary)])
        return {number for number, text in enumerate(texts) if "\n" in text}

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer; its first line if answers end there."""
        whole: str = self.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)
        return whole.lstrip("\n").split("\n", 1)[0] if self.with_line else whole

    def are_reached(self, ids: Sequence[int]) -> bool:
        """Whether an answer ends with its last token."""
        if ids[-1] in self.ends:
            return True
        return self.with_line and ids[-1] in self.line_tokens and bool(self.text(ids).strip())


def _answered(reading: Contexts, prepared_cell: PreparedCell, ends: Ends) -> AnswerRecord:
    """Compress every context of a sample, and answer the questions behind it."""
    started, pieces = time.perf_counter(), reading.cut.pieces
    answers: dict[int, Answer] = {}
    read: list[tuple[int, int, CacheBytes]] = []
    survival, spans = None, None
    for context, asked in reading.pieces.items():
        with torch.inference_mode(), prepared(reading.model, prepared_cell.adapter, reading.length(context)):
            session = reading.read(context, prepared_cell)
            read.append((session.kept, session.peak, session.bytes()))
            if len(read) == 1:
                survival, spans = kept_of(session, asked[0])
            for number, piece in enumerate(pieces):
                if piece in asked:
                    answers[number] = _answer(copy.deepcopy(session, _shared(session)), piece, ends)
    first, sizes = pieces[0], [size for _, _, size in read]
    return AnswerRecord(
        first.document, first.document, tuple(answers[number] for number in range(len(pieces))),
        len(read), sum(map(len, reading.pieces)), sum(kept for kept, _, _ in read), max(peak for _, peak, _ in read),
        sum(size.logical for size in sizes), sum(size.physical for size in sizes), sum(size.full for size in sizes),
        survival, spans, first.bin, round(time.perf_counter() - started, 4),
    )


def _shared(session: Session) -> dict[int, object]:
    """What copies of a session share: the model and all that is constant."""
    parts = {name: getattr(session, name, None) for name in ("model", "policy", "reader", "layout")}
    return {id(part): part for part in parts.values() if part is not None}


def _answer(session: Session, piece: Piece, ends: Ends) -> Answer:
    """Read the question, and answer it greedily; the cache grows by what is read and written."""
    assert piece.asked is not None, "pieces of this protocol ask"
    logits = _extended(session, piece.ids[piece.context :])
    ids: list[int] = []
    is_ended = False
    while len(ids) < piece.asked.new_tokens and not is_ended:
        ids.append(int(logits.argmax(-1)))
        is_ended = ends.are_reached(ids)
        if not is_ended and len(ids) < piece.asked.new_tokens:
            logits = _extended(session, ids[-1:])
    written = ids[:-1] if ids[-1] in ends.ends else ids
    text = ends.text(written)
    return Answer(tuple(written), text, SCORING[piece.asked.scoring](text, piece.asked.references), is_ended)


def _extended(session: Session, ids: Sequence[int]) -> Tensor:
    """Logits ``[1, vocabulary]`` after more text."""
    *_, part = session.extend(torch.tensor([ids], device=session.device))
    return part.logits[:, -1]


def kept_of(
    session: Session, piece: Piece
) -> tuple[tuple[tuple[float, ...], ...] | None, dict[str, tuple[int, float]] | None]:
    """What is held of the evidence, by layer and head, and of each kind of text, after the context was read."""
    held = session.held_positions()
    asked = piece.asked
    if held is None or asked is None or asked.spans is None:
        return None, None
    kinds: dict[str, Tensor] = {}
    filler = torch.ones(piece.context, dtype=torch.bool)
    for name, start, stop in asked.spans:
        inside = kinds.setdefault(name, torch.zeros(piece.context, dtype=torch.bool))
        inside[start:stop] = True
        filler[start:stop] = False
    kinds["filler"] = filler
    present = torch.stack([_present(layer[0], piece.context) for layer in held])  # [layers, heads, tokens]
    spans = {name: (int(inside.sum()), float(present[..., inside].sum(-1).double().mean()))
             for name, inside in kinds.items() if bool(inside.any())}
    if EVIDENCE not in spans:
        return None, spans
    shares = present[..., kinds[EVIDENCE]].double().mean(-1)
    return tuple(tuple(round(share, 4) for share in layer) for layer in shares.tolist()), spans


def _present(positions: Tensor, tokens: int) -> Tensor:
    """Whether each token has an entry: bool ``[heads, tokens]`` from positions ``[heads, entries]``, -1 for none."""
    places = positions.cpu().masked_fill(positions.cpu() < 0, tokens)
    seen = torch.zeros(len(places), tokens + 1, dtype=torch.bool)
    return seen.scatter_(-1, places, True)[:, :tokens]
