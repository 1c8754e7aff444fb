"""The child process of a run: loads the model once, measures documents, and sends their records as events.

It reads a :class:`Job` from its standard input, checks everything, sends ``ready`` and waits for
an :class:`Order`, so that nothing is written for a request that cannot be carried out; it ends when
there are no more orders. It writes no files: the parent writes the records that it sends.
Documents are the outer loop: ``full`` once per batch, then every other method, so that agreement with
the full cache costs no second pass and nothing of size tokens x vocabulary outlives its batch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from kvbench.cache.shape import cache_shape
from kvbench.data.documents import Document
from kvbench.errors import UserError
from kvbench.execution.answering import answer_window
from kvbench.execution.channel import (
    CELL_ERRORS,
    Channel,
    End,
    Failed,
    Ready,
    Records,
    failure_of,
    serving,
)
from kvbench.execution.generation import write_window
from kvbench.execution.job import Job, Order
from kvbench.execution.scoring import score_window
from kvbench.execution.workload import TaskWork, cut_task
from kvbench.inference.opening import check_method, held_at_end, places_needed
from kvbench.judges.loading import check_mauve, load_judges
from kvbench.methods import Method, make_method
from kvbench.methods.adapters import load_adapter
from kvbench.methods.layouts.mask_example import Mask
from kvbench.models.adapter import Adapter
from kvbench.models.fingerprint import check_unchanged
from kvbench.models.loading import load_model
from kvbench.models.references import ModelReference, given_adapter
from kvbench.models.rope import has_rotary
from kvbench.probe.cached import apart_at, probed
from kvbench.protocols.answer import AnswerProtocol
from kvbench.protocols.base import Protocol
from kvbench.protocols.decode import Decode
from kvbench.protocols.generate import Generate
from kvbench.protocols.pieces import Cut, Piece
from kvbench.protocols.scoring import text_of
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.records import HUMAN, Cell, DocumentRecord, Failure, GenerationRecord

WINDOW = 64
"""Number of documents that are batched together; if the process is killed, at most their unfinished ones are lost."""


@dataclass(frozen=True)
class PreparedCell:
    """A cell with its method and adapter, ready to be measured."""

    cell: Cell
    method: Method
    adapter: Adapter | None


class Worker:
    """Carries out a job; see the module docstring."""

    def __init__(self, job: Job, channel: Channel) -> None:
        self.job, self.channel, self.say = job, channel, channel.say
        self.failed: set[str] = set()
        self.infeasible: list[Failure] = []

    def prepare(self) -> None:
        """Load the model, adapters and judges, cut the documents, and check everything; writes nothing.

        Raises:
            UserError: the job cannot be carried out as requested.
        """
        job = self.job
        if job.threads:
            torch.set_num_threads(job.threads)
        cell = job.cells[0]
        reference = ModelReference(cell.model, job.location, cell.revision, cell.model_hash)
        self.loaded = load_model(reference, cell.device, cell.dtype)
        reference.check_unchanged()
        self.facts = probed(self.loaded, cell.model_hash)
        self.facts.check(cell.model)
        self.adapters: dict[str, Adapter] = {}
        for cell in job.cells:
            if cell.adapter is not None and cell.adapter not in self.adapters:
                folder = given_adapter(cell.adapter)
                adapter = load_adapter(folder, self.loaded.model)
                check_unchanged(folder, cell.adapter_hash or "")
                parameter = next(self.loaded.model.parameters())
                self.adapters[cell.adapter] = adapter.to(parameter.device, parameter.dtype)
        names = dict.fromkeys(cell.workload for cell in job.cells)
        self.works = [cut_task(job, name, self.loaded, self.facts) for name in names]
        self.prepared_cells = {cell.key: self._prepared_cell(cell) for cell in job.cells if cell.method != HUMAN}
        for work in self.works:
            self._check_reach(work)
        self._check_any_left()
        self._check_at_length(cell)
        self.judges = load_judges(job.judging, self.loaded, self.facts, cell.device, cell.dtype)
        for work in self.works:
            if isinstance(work.protocol, Generate):
                check_mauve(job.judging, work.task.name, len(work.documents))

    def _prepared_cell(self, cell: Cell) -> PreparedCell:
        method = make_method(cell.method, Fraction(cell.ratio_asked or 0), cell.options)
        return PreparedCell(cell, method, self.adapters[cell.adapter] if cell.adapter else None)

    def _check_reach(self, work: TaskWork) -> None:
        """Check that every method can be used on every piece; note the infeasible ones, if they may be left out."""
        pieces = {piece.shape: piece for _, cut in work.documents for piece in cut.pieces}
        longest = max(piece.context for piece in pieces.values())
        for cell in (c for c in work.cells if c.method != HUMAN):
            try:
                self._check_cell(cell, longest, list(pieces.values()), work.protocol)
            except UserError as error:
                if not self.job.skip_infeasible or cell.method == "full":
                    raise
                self.infeasible.append(Failure(cell.key, f"{cell.label}: {error.message}", error.hint, left_out=True))

    def _check_any_left(self) -> None:
        """Check that not all requested methods are infeasible."""
        asked = {cell.key for cell in self.job.cells if cell.role == "method"}
        if asked and asked <= {failure.cell for failure in self.infeasible}:
            raise UserError(self.infeasible[0].error, self.infeasible[0].hint)

    def _check_cell(self, cell: Cell, longest: int, pieces: Sequence[Piece], protocol: Protocol) -> None:
        method = self.prepared_cells[cell.key].method
        method.check(longest, protocol.in_chunks)
        check_method(method, self.loaded.model, cell.model, self.facts)
        shape = cache_shape(self.loaded.model)
        for context in {piece.context for piece in pieces}:
            method.with_budget_for(context, shape).check(context, protocol.in_chunks)
        for piece in pieces:
            self._check_positions(cell, method, piece, protocol)
            if isinstance(protocol, Decode) and method.compresses():
                held = held_at_end(method, self.loaded.model, text_of([replace(piece, layout=0)]), cell.seed)
                protocol.check_held(cell.method, held, len(piece.ids))

    def _check_at_length(self, cell: Cell) -> None:
        """Check, on a text of the greatest length, that the model predicts the same with stored entries as in one pass.

        Raises:
            UserError: the predictions differ by more than the tolerance.
        """
        longest = max(len(piece.ids) for work in self.works for _, cut in work.documents for piece in cut.pieces)
        longest = min(longest, self.loaded.context) if self.facts.learned else longest
        self.compared = apart_at(self.loaded, cell.model_hash, longest)
        length, found = self.compared
        if not found <= self.facts.tolerance:
            raise UserError(
                f"{cell.model}: {self.facts.kind} predicts a text of {length} tokens otherwise with entries stored "
                f"and removed than in one pass ({found:.2g} nats per token apart).",
                "Measure it on shorter texts, or choose another model.",
            )

    def _check_positions(self, cell: Cell, method: Method, piece: Piece, protocol: Protocol) -> None:
        """Check that the positions needed exist: learned ones end with the model's context, rotary ones do not end."""
        length = len(piece.ids)
        layout = places_needed(method, self.loaded.model, text_of([replace(piece, layout=0)]), cell.seed)
        needed = max(layout, length)
        written = int(cell.options["new_tokens"]) if cell.options.get("new_tokens", "auto") != "auto" else 0
        if needed > self.loaded.context and not has_rotary(self.loaded.model):
            raise UserError(
                f"{cell.model} has learned positions up to {self.loaded.context}, and {cell.method} needs "
                f"{needed} on this task.",
                protocol.shorter(self.loaded.context - (needed - length) - written),
            )

    def announce(self) -> None:
        """Tell the parent that everything is ready, and how the tasks were cut."""
        probe = {**self.facts.as_dict(), "compared_tokens": self.compared[0], "compared_apart": self.compared[1]}
        tasks = {work.name: work.info() for work in self.works}
        self.say(Ready(tasks, tuple(self.infeasible), self._masks(), probe))

    def _masks(self) -> dict[str, Mask]:
        """Masks of the methods on a short example text, by method and ratio as in ``Cell.label``; methods without a
        mask at that length are left out."""
        found: dict[str, Mask] = {}
        for key, prepared_cell in self.prepared_cells.items():
            cell = prepared_cell.cell
            name = f"{cell.name} {cell.ratio_asked or ''}".strip()
            if name not in found and key not in {failure.cell for failure in self.infeasible}:
                mask = prepared_cell.method.mask_example(cell.seed)
                if mask is not None:
                    found[name] = mask
        return found

    def run(self, order: Order) -> None:
        """Measure the documents of an order that are not on disk yet."""
        recorded = {key: set(documents) for key, documents in order.done.items()}
        self.failed |= set(order.failed)
        wanted = set(order.documents)
        work = next(work for work in self.works if work.name == order.workload)
        mine = tuple(pair for pair in work.documents if pair[0].id in wanted)
        for start in range(0, len(mine), WINDOW):
            self._run_window(work, mine[start : start + WINDOW], recorded)
        self.say(End())

    def _run_window(
        self, work: TaskWork, documents: tuple[tuple[Document, Cut], ...], done: dict[str, set[str]]
    ) -> None:
        if isinstance(work.protocol, Generate):
            write_window(self, work.cells, work.protocol, documents, done)
            return
        if isinstance(work.protocol, AnswerProtocol):
            answer_window(self, work.cells, work.protocol, documents, done)
            return
        score_window(self, work.cells, documents, done)

    @contextmanager
    def guarded(self, cell: Cell) -> Iterator[None]:
        """Report an error inside as a failure of the cell, which is not measured any more from then on."""
        try:
            yield
        except CELL_ERRORS as error:
            self.failed.add(cell.key)
            self.say(Failed(failure_of(cell.key, cell.label, error)))

    def record(self, cell: Cell, records: Sequence[DocumentRecord | GenerationRecord | AnswerRecord]) -> None:
        """Send finished records to the parent."""
        if records:
            self.say(Records(cell.key, tuple(dataclasses.asdict(record) for record in records)))


def main() -> None:
    """Entry point of the child process."""
    with serving() as (job, channel):
        worker = Worker(Job.from_json(job), channel)
        worker.prepare()
        worker.announce()
        for line in sys.stdin:
            worker.run(Order.from_json(line))


if __name__ == "__main__":
    main()
