"""Continues the prefixes of a batch under one cell: sessions that can join write together, others by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvbench.execution.evidence import kept_by_token
from kvbench.inference.generation import generate, read_prompt
from kvbench.inference.opening import joined, open_session, prepared
from kvbench.inference.sampling import Sampling
from kvbench.inference.session import CacheBytes, Session
from kvbench.models.loading import Loaded, end_tokens
from kvbench.protocols.generate import Generate, uniforms
from kvbench.protocols.pieces import Piece
from kvbench.protocols.scoring import text_of

if TYPE_CHECKING:
    from kvbench.execution.worker import PreparedCell


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
