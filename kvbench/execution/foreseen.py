"""What of a plan will be refused or left out, as far as lengths tell it before the model is loaded; for dry runs.

Documents are cut with the tokenizer's file alone, which takes a moment where loading transformers takes seconds. What
depends on the model itself, such as its positions, is found out when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from kvbench.cache.shape import CacheShape
from kvbench.data.tasks import load_task
from kvbench.errors import UserError
from kvbench.methods import make_method
from kvbench.models.sizes import Sizes, sizes_of
from kvbench.models.tokenizer_file import tokenizer_in
from kvbench.planning.quality import Plan
from kvbench.protocols.base import Protocol
from kvbench.protocols.cutting import cut_documents
from kvbench.protocols.pieces import make_tokenizer
from kvbench.protocols.registry import protocol_of
from kvbench.store.records import HUMAN, Cell, Failure

MOST_BYTES = 2 << 20
"""Bytes of text that are cut at most: a dry run shall take seconds."""
MOST_TRIALS = 6
"""Trials that are made of documents at most; they are alike in length."""
ASKING = ("answer", "questions")
"""Kinds of tasks whose prompts need the model's chat template."""


@dataclass(frozen=True)
class Foreseen:
    """What is known of a plan.

    Attributes:
        cells: those that will be measured; ``left_out``: why the others will not.
        documents: workload -> number of documents that are long enough, where it is known.
        unknown: workloads whose lengths are checked only when they are measured.
    """

    cells: tuple[Cell, ...]
    left_out: tuple[Failure, ...]
    documents: dict[str, int]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class _Lengths:
    """Lengths of the contexts of a workload, and the number of its documents; None if not all were looked at."""

    protocol: Protocol
    contexts: frozenset[int]
    documents: int | None


def foresee(plans: Sequence[Plan], skip_infeasible: bool) -> list[Foreseen]:
    """Look at the lengths of the documents of plans.

    Args:
        skip_infeasible: whether cells that cannot be measured on the documents are left out, instead of refused.

    Raises:
        UserError: a plan cannot be carried out.
    """
    seen: dict[tuple[str, ...], _Lengths | None] = {}  # seeds have the same documents
    return [_foresee(plan, skip_infeasible, seen) for plan in plans]


def _foresee(plan: Plan, skip_infeasible: bool, seen: dict[tuple[str, ...], _Lengths | None]) -> Foreseen:
    left_out: list[Failure] = []
    documents: dict[str, int] = {}
    unknown = []
    sizes = sizes_of(Path(plan.model.location)) if plan.model.is_folder else None
    for workload in dict.fromkeys(cell.workload for cell in plan.cells):
        cells = [cell for cell in plan.cells if cell.workload == workload]
        key = (plan.model.location, workload, cells[0].data_hash, cells[0].protocol)
        if key not in seen:
            seen[key] = None if sizes is None else _lengths(plan, cells, sizes)
        found = seen[key]
        if found is None or sizes is None:
            unknown.append(workload)
            continue
        if found.documents is not None:
            documents[workload] = found.documents
        for cell in cells:
            try:
                _check(cell, found, sizes)
            except UserError as error:
                if not skip_infeasible or cell.method == "full":
                    raise
                left_out.append(Failure(cell.key, f"{cell.label}: {error.message}", error.hint, left_out=True))
    gone = {failure.cell for failure in left_out}
    asked = {cell.key for cell in plan.cells if cell.role == "method"}
    if asked and asked <= gone:
        raise UserError(left_out[0].error, left_out[0].hint)
    cells_left = tuple(cell for cell in plan.cells if cell.key not in gone)
    return Foreseen(cells_left, tuple(left_out), documents, tuple(unknown))


def _lengths(plan: Plan, cells: Sequence[Cell], sizes: Sizes) -> _Lengths | None:
    """Cut the documents of a workload; None if their lengths cannot be known, or not soon.

    Raises:
        UserError: the lengths do not fit the model, or no document is long enough.
    """
    first = cells[0]
    task = load_task(plan.task_files[first.task])
    protocol = protocol_of(task, first.protocol).resolve(task, first.options, sizes.context, first.model)
    texts = plan.corpora[first.task].documents
    limit, makes_trials = plan.request.limit or None, task.kind in ("recall", "online")
    sources, _ = protocol.limited(texts, limit)
    size = sum(len(one.text) + sum(map(len, one.turns)) for one in sources[: None if makes_trials else limit])
    hf = tokenizer_in(Path(plan.model.location)) if task.kind not in ASKING and size <= MOST_BYTES else None
    if hf is None:
        return None
    most = min(limit or MOST_TRIALS, MOST_TRIALS) if makes_trials else limit
    tokenizer = make_tokenizer(hf, first.options["bos"])
    cuts, _ = cut_documents(protocol, cells, texts, tokenizer, sizes.context, most)
    contexts = frozenset(piece.context for _, cut in cuts for piece in cut.pieces)
    return _Lengths(protocol, contexts, None if makes_trials else len(cuts))


def _check(cell: Cell, found: _Lengths, sizes: Sizes) -> None:
    """Check that the method of a cell can be used on its texts, as it will be checked when the model is there.

    Raises:
        UserError: it cannot.
    """
    if cell.method == HUMAN or "budget_bytes" in cell.options or "fit" in cell.options:
        return  # bytes are those of the cache, which is measured
    method = make_method(cell.method, Fraction(cell.ratio_asked or 0), cell.options)
    method.check(max(found.contexts), found.protocol.in_chunks)
    shape = CacheShape.uniform(sizes.layers, sizes.heads, sizes.width, 4)
    for context in found.contexts:
        method.with_budget_for(context, shape).check(context, found.protocol.in_chunks)
