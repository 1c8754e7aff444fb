"""A workload (a task, and its option ``question`` if set): its documents in pieces, and the batches to score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.data.documents import Document, load_corpus
from kvbench.data.tasks import Task, load_task
from kvbench.errors import UserError
from kvbench.execution.batch_size import rows_at_once
from kvbench.execution.job import Job
from kvbench.judges.choice import NOTHING
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import Loaded
from kvbench.protocols.base import Protocol
from kvbench.protocols.cutting import cut_documents
from kvbench.protocols.pieces import Cut, Piece, make_tokenizer
from kvbench.protocols.registry import protocol_of
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell


@dataclass(frozen=True)
class TaskWork:
    """A workload after cutting: its documents with their pieces, and the cells that measure them."""

    task: Task
    protocol: Protocol
    documents: tuple[tuple[Document, Cut], ...]
    skipped: int
    cells: tuple[Cell, ...]
    signature: str

    @property
    def name(self) -> str:
        """The workload, such as ``recall:known``: the task, and its option ``question`` if that is not the default."""
        return self.cells[0].workload

    def info(self) -> TaskInfo:
        """The task as described in ``run.json`` and in reports."""
        return TaskInfo(
            kind=self.task.kind, answers=self.task.has_answers, version=self.task.version, signature=self.signature,
            seq_len=self.protocol.seq_len, new_tokens=getattr(self.protocol, "new_tokens", None),
            documents=tuple(document.id for document, _ in self.documents),
            lengths=tuple(tokens_of([cut]) for _, cut in self.documents), skipped_documents=self.skipped,
            dropped_tokens=sum(cut.dropped for _, cut in self.documents),
            tokens=tokens_of(cut for _, cut in self.documents),
        )


def cut_task(job: Job, name: str, loaded: Loaded, facts: ModelFacts) -> TaskWork:
    """Cut the documents of a workload into pieces for a model.

    Args:
        name: the workload, such as ``recall:known``.

    Raises:
        UserError: the lengths do not fit the model, no document is long enough, or the texts have changed.
    """
    cells = tuple(cell for cell in job.cells if cell.workload == name)
    first = cells[0]
    task = load_task(job.task_files[first.task])
    data = Path(job.data) if job.data else None
    corpus = load_corpus(task, data, job.column)
    if corpus.hash != first.data_hash:
        raise UserError(
            f"The texts of task {name!r} ({corpus.source}) have changed since this command began.",
            "Run it again once they are complete; what was measured before is kept apart.",
        )
    tokenizer = make_tokenizer(loaded.tokenizer, first.options["bos"])
    protocol = protocol_of(task, first.protocol).resolve(task, first.options, loaded.context, first.model)
    cuts, skipped = cut_documents(protocol, cells, corpus.documents, tokenizer, loaded.context, job.limit or None)
    longest = max(len(piece.ids) for _, cut in cuts for piece in cut.pieces)
    facts.check_length(first.model, longest, protocol.within(facts.window or longest))
    settings = (first.execution, tokenizer.bos is not None, _tokenizer_hash(loaded))
    # Version 2: earlier versions tokenised parts one by one and had other tokens. For a scorer they also tokenised a
    # text apart from its prefix, though a token may span both.
    version = 2 if first.options.get("scorer", NOTHING) != NOTHING else max(
        piece.version for _, cut in cuts for piece in cut.pieces
    )
    signature = with_mark(protocol.signature(*settings, version), facts.mark)
    return TaskWork(task, protocol, tuple(cuts), skipped, cells, signature)


def with_mark(signature: str, mark: str) -> str:
    """Insert the mark of a model (see ``ModelFacts``) into a signature, before the ``|v:`` and number that end it."""
    head, version, number = signature.rpartition("|v:")
    return f"{head}{mark}{version}{number}"


def tokens_of(cuts: Iterable[Cut]) -> int:
    return sum(len(piece.ids) for cut in cuts for piece in cut.pieces)


def batches(documents: tuple[tuple[Document, Cut], ...], vocabulary: int) -> Iterator[list[Piece]]:
    """Yield batches of pieces of equal shape; within a shape they are ordered by layout, so that a batch has few."""
    groups: dict[Any, list[Piece]] = {}
    for _, cut in documents:
        for piece in cut.pieces:
            groups.setdefault(piece.shape, []).append(piece)
    for pieces in groups.values():
        ordered = sorted(pieces, key=lambda piece: piece.layout)
        rows = rows_at_once(len(pieces[0].ids) - pieces[0].scored, vocabulary)
        for start in range(0, len(ordered), rows):
            yield ordered[start : start + rows]


def _tokenizer_hash(loaded: Loaded) -> str:
    vocabulary = sorted(loaded.tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:8]
