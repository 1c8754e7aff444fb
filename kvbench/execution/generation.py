"""Writing the continuations of a window of documents under every cell, and judging them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbench.cache.evicting import EvictingCache
from kvbench.data.documents import Document
from kvbench.execution.workload import together
from kvbench.inference.generation import Continuation, Sampling
from kvbench.inference.layout_session import Reader
from kvbench.inference.policy_session import PolicedContinuation, Policing
from kvbench.judges.encoder import packed
from kvbench.methods import Layout
from kvbench.methods.policies.policy import Policy
from kvbench.models.loading import Loaded, end_tokens
from kvbench.models.rope import fixed_rotations
from kvbench.protocols.generate import Writing, uniforms
from kvbench.protocols.pieces import Cut, Piece
from kvbench.store.records import HUMAN, Cell, GenerationRecord, Output

if TYPE_CHECKING:
    from kvbench.execution.worker import Runner, Worker

ROWS = 32
"""Texts that are written at a time, unless the batch is given."""

TICK = 8
"""Tokens between two reports of progress."""


def write_window(
    worker: Worker, cells: Sequence[Cell], writing: Writing, documents: Sequence[tuple[Document, Cut]],
    done: dict[str, set[str]],
) -> None:
    """Write and record what is not yet on disk; a fault stays in its cell."""
    groups = {document.id: document.group for document, _ in documents}
    for batch in _batches([cut.pieces[0] for _, cut in documents], writing):
        for cell in cells:
            todo = [piece for piece in batch if piece.document not in done.get(cell.key, ())]
            if todo and cell.key not in worker.failed:
                worker.say("at", cell=cell.key)
                with worker.guarded(cell):
                    records = _human(worker, batch, groups) if cell.method == HUMAN else _written(
                        worker, cell, writing, batch, groups
                    )
                    wanted = {piece.document for piece in todo}
                    worker.record(cell, [record for record in records if record.document in wanted])
            worker.say("tick", tokens=sum(len(piece.ids) for piece in batch))


def _batches(pieces: Sequence[Piece], writing: Writing) -> Iterator[list[Piece]]:
    """Pieces of equal lengths, those of one layout side by side."""
    size = writing.batch or max(1, ROWS // len(writing.decodings))
    ordered = sorted(pieces, key=lambda piece: (piece.shape, piece.layout))
    for _, group in groupby(ordered, key=lambda piece: piece.shape):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _human(worker: Worker, batch: list[Piece], groups: dict[str, str]) -> list[GenerationRecord]:
    """The authors' own texts: the reference, and what follows it."""
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
        )
        for i, piece in enumerate(batch)
    ]


def _written(
    worker: Worker, cell: Cell, writing: Writing, batch: list[Piece], groups: dict[str, str]
) -> list[GenerationRecord]:
    runner, records = worker.runners[cell.key], []
    for rows in together(batch, runner.method):
        pieces = [batch[row] for row in rows]
        started = time.perf_counter()
        layout = worker.layout(runner, pieces[0])
        records += _continued(worker, runner, writing, pieces, layout, groups, started)
    return records


def _continued(
    worker: Worker, runner: Runner, writing: Writing, pieces: list[Piece], layout: Layout,
    groups: dict[str, str], started: float,
) -> list[GenerationRecord]:
    loaded = worker.loaded
    policy = worker.fitted(runner.method, pieces[0].context).policy
    with fixed_rotations(loaded.model, len(pieces[0].ids)):
        texts, held, peak, sizes, before = written_ids(loaded, runner, writing, pieces, layout, policy)
    seconds = (time.perf_counter() - started) / len(pieces)
    visible, queries = _visibility(before, pieces[0], texts)
    names = [
        (kind, writing.decodings[:place].count(kind)) for place, kind in enumerate(writing.decodings)
    ]
    prefixes = [_text(loaded.tokenizer, piece.ids[: piece.context]) for piece in pieces]
    outputs = [
        _output(
            loaded.tokenizer, piece.ids[: piece.context], kind, draw, ids, len(ids) < len(piece.ids) - piece.context
        )
        for piece, rows in zip(pieces, texts, strict=True)
        for (kind, draw), ids in zip(names, rows, strict=True)
    ]
    judged = worker.judges.judged([prefix for prefix in prefixes for _ in names], outputs)
    return [
        GenerationRecord(
            piece.document, groups[piece.document], tuple(judged[i * len(names) : (i + 1) * len(names)]),
            piece.context, held, visible[i], queries[i], peak,
            kv_logical=sizes[0] / len(pieces), kv_physical=sizes[1] / len(pieces), kv_full=sizes[2] / len(pieces),
            seconds=round(seconds, 4),
        )
        for i, piece in enumerate(pieces)
    ]


def written_ids(
    loaded: Loaded, runner: Runner, writing: Writing, pieces: list[Piece], layout: Layout, policy: Policy | None
) -> tuple[list[list[tuple[int, ...]]], int, int, tuple[int, int, int], Tensor]:
    """What is written after each piece's prefix.

    Returns:
        Ids by piece and output, without the end token; entries held when the prefix had been read;
        the most ever held; (logical, physical, full) bytes of the cache at that moment; and for every
        token, how many earlier entries were seen where the next one was chosen.
    """
    device = next(loaded.model.parameters()).device
    prefix = torch.tensor([piece.ids[: piece.context] for piece in pieces], device=device)
    drawn = torch.stack([torch.from_numpy(uniforms(piece, writing, runner.cell.seed)) for piece in pieces])
    ends = end_tokens(loaded)
    settings = (prefix, drawn, layout, Sampling(writing.top_p, writing.temperature), ends, writing.chunk)
    if policy is None:
        text = Continuation(*settings, evicts=runner.cell.execution == "streamed")
    else:
        lots = [piece.layout for piece in pieces]
        text = PolicedContinuation(*settings, run=Policing(
            loaded.model, policy, prefix.shape[1], lots, runner.cell.seed
        ))
    reader = Reader(loaded.model, runner.adapter)
    with torch.inference_mode(), reader.ready():
        logits = text.read(reader)
        held = reader.trace.held
        logical, physical, full = _cache_bytes(text.cache, held, prefix.shape[1])
        sizes = (logical if policy is None else text.cache.logical_bytes(), physical, full)
        ids = torch.stack(list(text.write(reader, logits)), dim=1).cpu()
    if not bool(text.is_finite):
        raise RuntimeError("the model's predictions are not finite (overflow, or damaged weights)")
    found = [tuple(i for i in row if i >= 0 and i not in ends) for row in ids.tolist()]
    outputs = len(writing.decodings)
    return (
        [found[i : i + outputs] for i in range(0, len(found), outputs)], held, reader.trace.peak, sizes,
        text.visible_before,
    )


def _cache_bytes(cache: EvictingCache, held: int, raw: int) -> tuple[int, int, int]:
    per_entry = cache.entry_bytes()
    return held * per_entry, cache.physical_bytes(), raw * per_entry


def _visibility(
    before: Tensor, piece: Piece, texts: list[list[tuple[int, ...]]]
) -> tuple[list[float], list[int]]:
    """By document: sum over the queries that wrote a token of entries visible / text tokens before; queries."""
    places = torch.arange(max(1, piece.context - 1), len(before) - 1)
    share = torch.cumsum(before[places] / places, 0)
    lengths = [[min(len(ids), len(places)) for ids in rows] for rows in texts]
    sums = [float(sum(share[n - 1] for n in row if n)) for row in lengths]
    return sums, [sum(row) for row in lengths]


def _output(hf: object, before: Sequence[int], kind: str, draw: int, ids: Sequence[int], ended: bool) -> Output:
    """An output with its text, as it reads after the tokens before it: some decoders drop a leading space."""
    head = _text(hf, before).rstrip("\ufffd")
    whole = _text(hf, [*before, *ids])
    text = whole[len(head) :] if whole.startswith(head) else _text(hf, ids)
    return Output(kind, draw, tuple(ids), text, ended)


def _text(hf: object, ids: Sequence[int]) -> str:
    decoded: str = hf.decode(  # type: ignore[attr-defined]
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return decoded
