"""Generates the continuations of a window of documents under every cell, and has them judged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbench.data.documents import Document
from kvbench.execution.channel import Advanced, At
from kvbench.execution.texts import WrittenTexts, write_texts
from kvbench.inference.opening import rows_together
from kvbench.judges.encoder import packed
from kvbench.protocols.generate import Generate
from kvbench.protocols.pieces import Cut, Piece
from kvbench.store.records import HUMAN, Cell, GenerationRecord, Output

if TYPE_CHECKING:
    from kvbench.execution.worker import Worker

ROWS = 32
"""Number of texts generated at a time, unless the option ``batch`` is given."""

TICK = 8
"""Number of tokens between two progress events."""


def write_window(
    worker: Worker, cells: Sequence[Cell], protocol: Generate, documents: Sequence[tuple[Document, Cut]],
    done: dict[str, set[str]],
) -> None:
    """Generate and record the texts that are not on disk yet; an error affects only its own cell."""
    groups = {document.id: document.group for document, _ in documents}
    for batch in _batches([cut.pieces[0] for _, cut in documents], protocol):
        for cell in cells:
            todo = [piece for piece in batch if piece.document not in done.get(cell.key, ())]
            if todo and cell.key not in worker.failed:
                worker.say(At(cell.key))
                with worker.guarded(cell):
                    records = _human(worker, batch, groups) if cell.method == HUMAN else _written(
                        worker, cell, protocol, batch, groups
                    )
                    wanted = {piece.document for piece in todo}
                    worker.record(cell, [record for record in records if record.document in wanted])
            worker.say(Advanced(sum(len(piece.ids) for piece in batch)))
        worker.judges.forget()


def _batches(pieces: Sequence[Piece], protocol: Generate) -> Iterator[list[Piece]]:
    """Yield batches of pieces of equal shape, ordered by layout."""
    size = protocol.batch or max(1, ROWS // len(protocol.decodings))
    ordered = sorted(pieces, key=lambda piece: (piece.shape, piece.layout))
    for _, group in groupby(ordered, key=lambda piece: piece.shape):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _human(worker: Worker, batch: list[Piece], groups: dict[str, str]) -> list[GenerationRecord]:
    """Records of the human texts: the reference, and the author's text after it."""
    hf = worker.loaded.tokenizer
    prefixes = [_text(hf, piece.ids[: piece.context]) for piece in batch]
    outputs = [
        _output(hf, piece.ids[: piece.context], "human", 0, piece.ids[piece.context :], False) for piece in batch
    ]
    outputs += [_output(hf, piece.ids, "after", 0, piece.after, False) for piece in batch]
    judged = worker.judges.judged(prefixes * 2, outputs)
    encoder = worker.judges.encoder
    vectors = [None] * len(batch) if encoder is None else [packed(v) for v in encoder.encode(prefixes)]
    return [
        GenerationRecord(
            piece.document, groups[piece.document], (judged[i], judged[len(batch) + i]),
            0, 0, 0.0, 0, 0, 0.0, 0.0, 0.0, prefix=prefixes[i],
            prefix_ids=piece.ids[: piece.context], prefix_vector=vectors[i],
            prefix_ends=_ends(hf, piece.ids[: piece.context]),
        )
        for i, piece in enumerate(batch)
    ]


def _written(
    worker: Worker, cell: Cell, protocol: Generate, batch: list[Piece], groups: dict[str, str]
) -> list[GenerationRecord]:
    """Records of a batch, whose pieces are read in groups that share a session, and written together."""
    prepared_cell = worker.prepared_cells[cell.key]
    together = [
        [batch[row] for row in rows] for rows in rows_together(prepared_cell.method, [piece.layout for piece in batch])
    ]
    started = time.perf_counter()
    found = write_texts(worker.loaded, prepared_cell, protocol, together, can_join=not worker.facts.policy_refusal)
    seconds = (time.perf_counter() - started) / len(batch)
    return [
        record for pieces, written in zip(together, found, strict=True)
        for record in _records(worker, protocol, pieces, written, seconds, groups)
    ]


def _records(
    worker: Worker, protocol: Generate, pieces: list[Piece], written: WrittenTexts, seconds: float,
    groups: dict[str, str],
) -> list[GenerationRecord]:
    loaded, sizes = worker.loaded, written.sizes
    visible, queries = _visibility(written.shares, written.ids)
    names = [
        (kind, protocol.decodings[:place].count(kind)) for place, kind in enumerate(protocol.decodings)
    ]
    prefixes = [_text(loaded.tokenizer, piece.ids[: piece.context]) for piece in pieces]
    outputs = [
        _output(
            loaded.tokenizer, piece.ids[: piece.context], kind, draw, ids, len(ids) < len(piece.ids) - piece.context
        )
        for piece, rows in zip(pieces, written.ids, strict=True)
        for (kind, draw), ids in zip(names, rows, strict=True)
    ]
    judged = worker.judges.judged([prefix for prefix in prefixes for _ in names], outputs)
    return [
        GenerationRecord(
            piece.document, groups[piece.document], tuple(judged[i * len(names) : (i + 1) * len(names)]),
            written.read, written.kept, visible[i], queries[i], written.peak,
            kv_logical=sizes.logical / len(pieces), kv_physical=sizes.physical / len(pieces),
            kv_full=sizes.full / len(pieces),
            seconds=round(seconds, 4), kept=written.by_token[i],
        )
        for i, piece in enumerate(pieces)
    ]


def _visibility(shares: Tensor, texts: list[list[tuple[int, ...]]]) -> tuple[list[float], list[int]]:
    """Per document: sum of entries visible / text tokens before over the queries that chose a token, and their
    number."""
    share = torch.cumsum(shares, 0)
    lengths = [[min(len(ids), len(shares)) for ids in rows] for rows in texts]
    sums = [float(sum(share[n - 1] for n in row if n)) for row in lengths]
    return sums, [sum(row) for row in lengths]


def _output(hf: object, before: Sequence[int], kind: str, draw: int, ids: Sequence[int], ended: bool) -> Output:
    """Create an output; its text is decoded with the tokens before it, since some decoders drop a leading space."""
    head = _text(hf, before).rstrip("\ufffd")
    whole = _text(hf, [*before, *ids])
    text = whole[len(head) :] if whole.startswith(head) else _text(hf, ids)
    return Output(kind, draw, tuple(ids), text, ended)


def _ends(hf: object, ids: Sequence[int]) -> tuple[int, ...]:
    """Where tokens end in the text that they decode to; parts of a character that is not whole yet end before it."""
    return tuple(accumulate((len(_text(hf, ids[:count]).rstrip("\ufffd")) for count in range(1, len(ids) + 1)), max))


def _text(hf: object, ids: Sequence[int]) -> str:
    decoded: str = hf.decode(  # type: ignore[attr-defined]
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return decoded
