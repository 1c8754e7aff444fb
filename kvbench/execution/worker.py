"""The child process: loads the model once, walks the documents, and reports as it goes.

It reads a :class:`Job` from its standard input, checks everything, says ``ready`` and waits for
``go``, so that nothing is written for a request that cannot be carried out. It writes no file:
records are events, and the parent puts them on disk. Documents are the outer loop: ``full`` once
per batch, then every other method, so that agreement with the full cache costs no second pass
and nothing of size tokens x vocabulary outlives its batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import torch

from kvbench.corpora.documents import Document, load_corpus
from kvbench.corpora.tasks import Task, load_task
from kvbench.errors import UserError
from kvbench.execution.job import Job
from kvbench.methods import Layout, Method, make_layout, make_method
from kvbench.models.adapter import Adapter
from kvbench.models.loading import Loaded, load_model, window_of
from kvbench.models.references import ModelReference
from kvbench.protocols.cut import (
    MIN_TOKENS,
    Cut,
    Piece,
    Tokenizer,
    cut_blocks,
    cut_prefix,
    cut_stream,
    make_tokenizer,
    recall_trials,
)
from kvbench.protocols.protocol import Protocol, resolve_protocol
from kvbench.protocols.score import BatchScore, Reference, kl_histogram, score_batch
from kvbench.store.records import Cell, DocumentRecord, Failure

WINDOW = 64
"""Documents that are batched together; a kill loses at most the unfinished ones of a window."""

MAX_ROWS, MAX_SCORES = 8, 1 << 25
"""Bounds on a batch: rows, and rows x targets x vocabulary."""


@dataclass(frozen=True)
class Work:
    """A task, cut: the documents with their pieces, and the cells that measure them."""

    task: Task
    protocol: Protocol
    documents: tuple[tuple[Document, Cut], ...]
    skipped: int
    cells: tuple[Cell, ...]
    signature: str


@dataclass(frozen=True)
class Runner:
    """A cell made ready to run."""

    cell: Cell
    method: Method
    adapter: Adapter | None


class Worker:
    """Carries out a job; see the module's docstring."""

    def __init__(self, job: Job, events: IO[str]) -> None:
        self.job = job
        self.events = events
        self.layouts: dict[tuple[int, int, Fraction, str, int], Layout] = {}
        self.failed: set[str] = set()

    def say(self, event: str, **fields: Any) -> None:
        self.events.write(json.dumps({"event": event, **fields}) + "\n")
        self.events.flush()

    def prepare(self) -> None:
        """Load and check everything; writes nothing.

        Raises:
            UserError: the job cannot be carried out as asked.
        """
        job = self.job
        if job.threads:
            torch.set_num_threads(job.threads)
        cell = job.cells[0]
        reference = ModelReference(cell.model, job.location, cell.revision, cell.model_hash)
        self.loaded = load_model(reference, cell.device, cell.dtype)
        self.adapters: dict[str, Adapter] = {}
        for cell in job.cells:
            if cell.adapter is not None and cell.adapter not in self.adapters:
                adapter = Adapter.load(Path(cell.adapter), self.loaded.model)
                parameter = next(self.loaded.model.parameters())
                self.adapters[cell.adapter] = adapter.to(parameter.device, parameter.dtype)
        names = dict.fromkeys(cell.task for cell in job.cells)
        self.works = [self._cut(name) for name in names]
        self.runners = {cell.key: self._runner(cell) for cell in job.cells}
        for work in self.works:
            self._check_reach(work)

    def _cut(self, name: str) -> Work:
        cells = tuple(cell for cell in self.job.cells if cell.task == name)
        first = cells[0]
        task = load_task(self.job.task_files[name])
        data = Path(self.job.data) if self.job.data else None
        corpus = load_corpus(task, data)
        loaded, limit = self.loaded, self.job.limit or None
        tokenizer = make_tokenizer(loaded.tokenizer, first.options["bos"])
        protocol = resolve_protocol(first.protocol, first.options, loaded.context, first.model)
        cuts: list[tuple[Document, Cut]] = []
        skipped, sample = 0, corpus.documents
        for document, cut in _cut_all(task, sample, tokenizer, protocol, first.seed):
            longest = max((len(piece.ids) for piece in cut.pieces), default=0)
            if not cut.pieces or (task.kind == "recall" and longest > loaded.context):
                skipped += 1
                continue
            cuts.append((document, cut))
            if len(cuts) == limit:
                break
        if not cuts:
            least = protocol.longest if protocol.continuation else MIN_TOKENS
            raise UserError(
                f"Task {name!r}: no document is long enough for protocol {protocol.name!r} "
                f"({least} tokens are needed, {skipped} documents are shorter or do not fit).",
                "Give longer documents, or another --protocol.",
            )
        window = window_of(loaded.model.config)
        longest = max(len(piece.ids) for _, cut in cuts for piece in cut.pieces)
        if window is not None and window < longest:
            raise UserError(
                f"{first.model} attends within a sliding window of {window} tokens, shorter than "
                f"the {longest} tokens of a sequence: its full cache is already compressed.",
                f"Keep sequences within {window} tokens, such as --set block={window}.",
            )
        signature = protocol.signature(
            first.execution, tokenizer.bos is not None, _tokenizer_hash(loaded),
            task.recall.signature() if task.recall else None,
        )
        return Work(task, protocol, tuple(cuts), skipped, cells, signature)

    def _runner(self, cell: Cell) -> Runner:
        method = make_method(cell.method, Fraction(cell.ratio_asked or 0), cell.options)
        return Runner(cell, method, self.adapters[cell.adapter] if cell.adapter else None)

    def _check_reach(self, work: Work) -> None:
        lengths = {piece.context for _, cut in work.documents for piece in cut.pieces}
        for cell in work.cells:
            for length in lengths:
                make_layout(self.runners[cell.key].method, length, cell.seed, 0)

    def announce(self) -> None:
        """Tell the parent what there is to do."""
        self.say("ready", tasks={
            work.task.name: {
                "kind": work.task.kind, "version": work.task.version, "signature": work.signature,
                "seq_len": work.protocol.length if work.task.kind == "lm" else None,
                "documents": [document.id for document, _ in work.documents],
                "skipped_documents": work.skipped,
                "dropped_tokens": sum(cut.dropped for _, cut in work.documents),
                "tokens": _tokens(cut for _, cut in work.documents),
            }
            for work in self.works
        }, total=sum(_tokens(cut for _, cut in w.documents) * len(w.cells) for w in self.works))

    def run(self, done: dict[str, list[str]]) -> None:
        """Measure this child's share of what is not yet on disk (``done``: documents by cell)."""
        recorded = {key: set(documents) for key, documents in done.items()}
        for work in self.works:
            mine = work.documents[self.job.shard :: self.job.shards]
            for start in range(0, len(mine), WINDOW):
                self._run_window(work, mine[start : start + WINDOW], recorded)
        self.say("end")

    def _run_window(
        self, work: Work, documents: tuple[tuple[Document, Cut], ...], done: dict[str, set[str]]
    ) -> None:
        pending = {
            (cell.key, document.id): _Pending(document, cut)
            for cell in work.cells for document, cut in documents
            if document.id not in done.get(cell.key, ())
        }
        vocabulary = self.loaded.vocabulary
        for batch in _batches(documents, vocabulary):
            todo = [c for c in work.cells if any((c.key, p.document) in pending for p in batch)]
            needs_full = any(cell.method != "full" for cell in todo)
            tokens, reference = sum(len(p.ids) for p in batch), None
            for cell in work.cells:
                wanted = cell in todo or (cell.method == "full" and needs_full)
                if wanted and cell.key not in self.failed:
                    self.say("at", cell=cell.key)
                    kept = self._measure(cell, batch, reference, pending)
                    reference = reference or kept
                self.say("tick", tokens=tokens)

    def _measure(
        self, cell: Cell, batch: list[Piece], reference: Reference | None,
        pending: dict[tuple[str, str], _Pending],
    ) -> Reference | None:
        """Score a batch under one cell and store what is complete; a fault stays in its cell.

        Returns:
            The predictions to compare the other methods with, if this is the full cache.
        """
        runner = self.runners[cell.key]
        is_full, kept = cell.method == "full", None
        try:
            for rows in _same_layout(batch) if runner.method.seeded else [list(range(len(batch)))]:
                pieces = [batch[row] for row in rows]
                started = time.perf_counter()
                score, kept = score_batch(
                    self.loaded.model, runner.adapter, self._layout(runner, pieces[0]), pieces,
                    reference.rows(rows) if reference else None, cell.execution,
                    int(cell.options["chunk"]), keep_reference=is_full,
                )
                self._store(cell, pieces, score, pending, time.perf_counter() - started)
        except (RuntimeError, ValueError, IndexError, MemoryError, UserError) as error:
            self.failed.add(cell.key)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            failure = Failure(cell.key, f"{cell.label}: {reason}", getattr(error, "hint", ""))
            print(traceback.format_exc(), file=sys.stderr)
            self.say("failed", **dataclasses.asdict(failure))
        return kept

    def _layout(self, runner: Runner, piece: Piece) -> Layout:
        method = runner.method
        which = piece.layout if method.seeded else 0
        key = (piece.context, runner.cell.seed, method.ratio, method.name, which)
        if key not in self.layouts:
            if len(self.layouts) >= 512:
                self.layouts.clear()
            self.layouts[key] = make_layout(method, piece.context, runner.cell.seed, which)
        return self.layouts[key]

    def _store(
        self, cell: Cell, batch: list[Piece], score: BatchScore,
        pending: dict[tuple[str, str], _Pending], seconds: float,
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
        if finished:
            self.say("records", cell=cell.key, records=[dataclasses.asdict(r) for r in finished])


class _Pending:
    """A document whose pieces are being scored under one cell."""

    def __init__(self, document: Document, cut: Cut) -> None:
        self.document, self.cut = document, cut
        self.left = len(cut.pieces)
        self.sums: dict[str, Any] = defaultdict(float)
        self.bins: dict[str, int] = defaultdict(int)
        self.has_kl, self.peak = True, 0

    @property
    def complete(self) -> bool:
        return self.left == 0

    def add(self, piece: Piece, score: BatchScore, row: int, rows: int, seconds: float) -> None:
        s = self.sums
        s["tokens"] += score.nll.shape[1]
        s["n_bytes"] += piece.n_bytes
        s["nll"] += float(score.nll[row].sum())
        s["hits"] += int(score.hit[row].sum())
        s["correct"] += int(score.hit[row].all())
        s["raw"] += piece.context
        s["held"] += score.held
        s["visible"] += score.visible
        s["queries"] += score.queries
        s["kv_logical"] += score.logical / rows
        s["kv_physical"] += score.physical / rows
        s["kv_full"] += score.full / rows
        s["seconds"] += seconds / rows
        self.peak = max(self.peak, score.peak)
        if score.kl is None or score.top1 is None:
            self.has_kl = False
        else:
            s["kl"] += float(score.kl[row].sum())
            s["top1"] += int(score.top1[row].sum())
            for place, count in kl_histogram(score.kl[row]).items():
                self.bins[place] += count
        self.left -= 1

    def record(self) -> DocumentRecord:
        s, whole = self.sums, ("tokens", "n_bytes", "hits", "correct", "raw", "held", "queries")
        return DocumentRecord(
            document=self.document.id, group=self.document.group, pieces=len(self.cut.pieces),
            dropped=self.cut.dropped, **{name: int(s[name]) for name in whole},
            nll=s["nll"], visible=s["visible"], peak=self.peak,
            kl=s["kl"] if self.has_kl else None, kl_bins=dict(self.bins) if self.has_kl else None,
            top1=int(s["top1"]) if self.has_kl else None, kv_logical=s["kv_logical"],
            kv_physical=s["kv_physical"], kv_full=s["kv_full"], bin=self.cut.pieces[0].bin,
            seconds=round(s["seconds"], 4),
        )


def _cut_all(
    task: Task, documents: tuple[Document, ...], tokenizer: Tokenizer, protocol: Protocol, seed: int
) -> Iterator[tuple[Document, Cut]]:
    if task.recall is not None:
        yield from recall_trials(documents, tokenizer, task.recall, seed)
        return
    for document in documents:
        if protocol.name == "block":
            yield document, cut_blocks(document, tokenizer, protocol.length)
        elif protocol.name == "stream":
            yield document, cut_stream(document, tokenizer, protocol.length)
        else:
            yield document, cut_prefix(document, tokenizer, protocol.length, protocol.continuation)


def _tokens(cuts: Iterator[Cut]) -> int:
    return sum(len(piece.ids) for cut in cuts for piece in cut.pieces)


def _batches(documents: tuple[tuple[Document, Cut], ...], vocabulary: int) -> Iterator[list[Piece]]:
    """Pieces of equal shape together, those of one layout side by side."""
    groups: dict[tuple[int, int, int], list[Piece]] = {}
    for _, cut in documents:
        for piece in cut.pieces:
            groups.setdefault(piece.shape, []).append(piece)
    for pieces in groups.values():
        ordered = sorted(pieces, key=lambda piece: piece.layout)
        targets = len(pieces[0].ids) - pieces[0].scored
        rows = max(1, min(MAX_ROWS, MAX_SCORES // max(1, targets * vocabulary)))
        for start in range(0, len(ordered), rows):
            yield ordered[start : start + rows]


def _same_layout(batch: list[Piece]) -> list[list[int]]:
    """Rows of a batch that share a layout, so that a seeded method evicts them together."""
    found: dict[int, list[int]] = {}
    for row, piece in enumerate(batch):
        found.setdefault(piece.layout, []).append(row)
    return list(found.values())


def _tokenizer_hash(loaded: Loaded) -> str:
    vocabulary = sorted(loaded.tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:8]


def main() -> None:
    """Entry of the child: job on stdin, events on stdout, everything else on stderr."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(Job.from_json(sys.stdin.readline()), events)
    try:
        worker.prepare()
        worker.announce()
        order = sys.stdin.readline()
        if order:
            worker.run(json.loads(order))
    except UserError as error:
        worker.say("refused", message=error.message, hint=error.hint)


if __name__ == "__main__":
    main()
