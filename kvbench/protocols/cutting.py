"""Cuts the documents of a task for a model, and leaves out those that are too short or too long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from kvbench.data.documents import Document
from kvbench.errors import UserError
from kvbench.methods import make_method
from kvbench.protocols.base import Protocol
from kvbench.protocols.pieces import Cut, Tokenizer
from kvbench.store.records import HUMAN, Cell


def cut_documents(
    protocol: Protocol, cells: Sequence[Cell], documents: Sequence[Document], tokenizer: Tokenizer, context: int,
    limit: int | None,
) -> tuple[list[tuple[Document, Cut]], int]:
    """Cut documents, or make trials of them, until there are as many as are wanted.

    Args:
        cells: of one workload.
        context: length of the model's context; longer pieces are skipped, unless the protocol allows them.
        limit: maximum number of results; None for all.

    Returns:
        The documents with their pieces, and the number of those that were skipped.

    Raises:
        UserError: none is left.
    """
    cuts: list[tuple[Document, Cut]] = []
    skipped = 0
    sources, limit = protocol.limited(documents, limit)
    for document, cut in protocol.pieces(sources, tokenizer, cells[0].seed, _with_words(cells)):
        longest = max((len(piece.ids) for piece in cut.pieces), default=0)
        if not cut.pieces or (not protocol.may_exceed and longest > context):
            skipped += 1
            continue
        cuts.append((document, cut))
        if len(cuts) == limit:
            break
    if not cuts:
        all_of_them = "the only document is shorter or does not fit" if skipped == 1 else (
            f"all {skipped} documents are shorter or do not fit"
        )
        raise UserError(
            f"Task {cells[0].workload!r}: no document is long enough for protocol {protocol.name!r} "
            f"({protocol.required_length} are needed, {all_of_them}).", protocol.longer,
        )
    return cuts, skipped


def _with_words(cells: Iterable[Cell]) -> bool:
    """Whether a method of the cells needs to know where words are."""
    measured = (cell for cell in cells if cell.method != HUMAN)
    return any(make_method(cell.method, Fraction(0), cell.options).depends_on_words for cell in measured)
