"""Generates the continuations of a window of documents under every cell, and has them judged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvbench.data.documents import Document
from kvbench.execution.channel import Advanced, At
from kvbench.execution.evidence import kept_by_token
from kvbench.inference.generation import generate, read_prompt
from kvbench.inference.opening import joined, open_session, prepared, rows_together
from kvbench.inference.sampling import Sampling
from kvbench.inference.session import CacheBytes, Session
from kvbench.judges.encoder import packed
from kvbench.models.loading import Loaded, end_tokens
from kvbench.protocols.generate import Generate, uniforms
from kvbench.protocols.pieces import Cut, Piece
from kvbench.protocols.scoring import text_of
from kvbench.store.records import HUMAN, Cell, GenerationRecord, Output

if TYPE_CHECKING:
    from kvbench.execution.worker import PreparedCell, Worker

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


class WrittenTexts(NamedTuple):
    """Continuations of a batch of prefixes, and what the cache held.

    Attributes:
        ids: by piece and output, without the end token.
        read: tokens of the prefix, or of all that was read, if entries are removed while text is written; ``kept``:
            entries held then, and ``sizes`` their bytes, over all rows.
        peak: the most entries ever held.
        shares: for every position that can be generated, entries visible / text tokens before, for the query that
            predicts it.
        by_token: how much is held of each token of the prefix, by piece (see ``GenerationRecord.kept``).
    """

    ids: list[list[tuple[int, ...]]]
    read: int
    kept: int
    peak: int
    sizes: CacheBytes
    shares: Tensor
    by_token: list[str | None]


def write_texts(
    loaded: Loaded, prepared_cell: PreparedCell, protocol: Generate, groups: Sequence[Sequence[Piece]],
    can_join: bool = True,
) -> list[WrittenTexts]:
    """Generate the continuations of the pieces' prefixes, by group of pieces that share a session.

    Args:
        can_join: whether one forward pass may serve several sessions: the model is one that policies can be used on.
    """
    model, cell, first = loaded.model, prepared_cell.cell, groups[0][0]
    with torch.inference_mode(), prepared(model, prepared_cell.adapter, len(first.ids)):
        sessions = [
            open_session(
                model, prepared_cell.method, text_of(pieces), adapter=prepared_cell.adapter, seed=cell.seed,
                execution=cell.execution, chunk=protocol.chunk, is_late=protocol.compresses_late,
            )
            for pieces in groups
        ]
        ends = list(accumulate(len(pieces) for pieces in groups))
        rows = torch.arange(ends[-1], device=sessions[0].device).tensor_split(ends[:-1])
        together = joined(model, list(zip(rows, sessions, strict=True)), layouts=True) if can_join else None
        if len(groups) == 1 or together is not None:
            prefixes = [_read(session, protocol, pieces) for session, pieces in zip(sessions, groups, strict=True)]
            drawn = [torch.from_numpy(uniforms(piece, protocol, cell.seed)) for pieces in groups for piece in pieces]
            steps = generate(
                sessions[0] if together is None else together,
                torch.cat([prefix.logits for prefix in prefixes]), torch.stack(drawn),
                Sampling(protocol.top_p, protocol.temperature), end_tokens(loaded),
            )
            splits = [end * len(protocol.decodings) for end in ends[:-1]]
            written = _written_by(steps, sessions, splits, end_tokens(loaded))
            return [
                _texts(session, prefix, protocol, pieces, one, end_tokens(loaded))
                for session, prefix, pieces, one in zip(sessions, prefixes, groups, written, strict=True)
            ]
    return [written for pieces in groups for written in write_texts(loaded, prepared_cell, protocol, [pieces])]


class _Prefix(NamedTuple):
    """What a session held when it had read the prefixes of a group, and the logits after them."""

    logits: Tensor
    kept: int
    sizes: CacheBytes
    by_token: list[str | None]


def _read(session: Session, protocol: Generate, pieces: Sequence[Piece]) -> _Prefix:
    context = pieces[0].context
    ids = torch.tensor([piece.ids[:context] for piece in pieces], device=session.device)
    logits = read_prompt(session, ids)
    by_token: list[str | None] = [None] * len(pieces)
    if not protocol.compresses_late:
        by_token = kept_by_token(session, len(pieces), context)
    return _Prefix(logits, session.kept, session.bytes(), by_token)


class _Written(NamedTuple):
    """What a session has written, ids ``[rows, tokens]``, and what it held when the last of its rows ended."""

    ids: Tensor
    peak: int
    kept: int
    sizes: CacheBytes


def _written_by(
    steps: Iterator[Tensor], sessions: Sequence[Session], splits: Sequence[int], ends: tuple[int, ...]
) -> list[_Written]:
    """Collect the tokens of all rows; a session goes on being fed until those of the others have ended as well."""
    columns: list[Tensor] = []
    found: dict[int, _Written] = {}

    def note(place: int) -> None:
        session, ids = sessions[place], torch.stack(columns, 1).tensor_split(splits)[place].cpu()
        found[place] = _Written(ids, session.peak, session.kept, session.bytes())

    ended = torch.zeros((), dtype=torch.bool)
    for ids in steps:
        columns.append(ids)
        if len(sessions) > 1 and ends:
            ended = ended.to(ids.device) | torch.isin(ids, torch.tensor(ends, device=ids.device))
            for place, rows in enumerate(ended.tensor_split(splits)):
                if place not in found and bool(rows.all()):
                    note(place)
    for place in range(len(sessions)):
        if place not in found:
            note(place)
    return [found[place] for place in range(len(sessions))]


def _texts(
    session: Session, prefix: _Prefix, protocol: Generate, pieces: Sequence[Piece], written: _Written,
    ends: tuple[int, ...],
) -> WrittenTexts:
    context, outputs, ids = pieces[0].context, len(protocol.decodings), written.ids
    read, kept, sizes = context, prefix.kept, prefix.sizes
    if protocol.compresses_late:
        read = context + ids.shape[1] - 1
        kept, sizes = written.kept, written.sizes
        sizes = sizes._replace(full=sizes.full * read // context)
        sizes = CacheBytes(*(size // outputs for size in sizes))  # of one text for each prefix
    found = [tuple(i for i in row if i >= 0 and i not in ends) for row in ids.tolist()]
    queries = torch.arange(max(1, context - 1), len(pieces[0].ids) - 1)
    texts = [found[i : i + outputs] for i in range(0, len(found), outputs)]
    return WrittenTexts(texts, read, kept, written.peak, sizes, session.visible(queries) / queries, prefix.by_token)


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
