"""The layout of text whose chunks are each replaced by memory that was computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvbench.methods.layouts.chunked import ChunkVisibility, equal_chunks
from kvbench.methods.layouts.chunks import LONGEST
from kvbench.methods.layouts.layout import COMP, TEXT, Layout, TextStructure, Tokens

PLACES = ("spread", "end", "own")
"""Where the entries of a memory stand: spread over the places of their chunk, all at its last place, or counted from 0,
with the text that follows counted on from the last of them."""


class Chunks(NamedTuple):
    """How a text is cut: lengths of all chunks, and how many of them end before its prefix or context does."""

    lengths: list[int]
    closed: int


def chunks_of(n: int, chunk: int, n_comp: int, text: TextStructure) -> Chunks:
    """The chunks of a text of ``n`` tokens, of ``chunk`` tokens each if it is running text.

    Where it is read for what follows, its last token stays outside; the next chunk ends after it.
    """
    if text.chunks:
        return Chunks(list(text.chunks), len(text.chunks))
    read = text.prefix or n
    before = equal_chunks(read - text.is_continued, chunk, n_comp)
    rest, pending = n - sum(before), read - sum(before)
    first = max(chunk, pending + 1)
    if not text.prefix or rest <= pending:
        behind = []
    elif rest < first:
        behind = equal_chunks(rest, first, n_comp)
    else:
        behind = [first, *equal_chunks(rest - first, chunk, n_comp)]
    return Chunks(before + behind, len(before))


def chunk_bounds(n: int, n_comp: int, shortest: int) -> tuple[int, int]:
    """The least and the greatest length of chunks to train on."""
    low = min(max(shortest, n_comp), n // 2)
    return low, max(low, min(LONGEST, n // 2))


def sampled_chunks(n: int, n_comp: int, shortest: int, rng: np.random.Generator) -> list[int]:
    """Chunks to train on: of one length, sampled log-uniformly; sometimes the end of the text stays uncompressed."""
    low, high = chunk_bounds(n, n_comp, shortest)
    length = round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))
    compressed = n if rng.random() < 0.75 else int(rng.integers(length, n))
    return equal_chunks(compressed, length, n_comp)


def memory_layout(
    n: int, chunks: Sequence[int], n_comp: int, *, is_latest: bool, place: str, unread: int = 0
) -> Layout:
    """The sequence chunk, its memory, chunk, ... and the rest of the text, which is not compressed.

    Text sees the memory of the chunks before its own, and text of its own chunk. Memory sees earlier memory and never
    text, so that a chunk has left the cache before its memory is fed.

    Args:
        chunks: their lengths, from the first token on.
        n_comp: memory entries per chunk.
        is_latest: whether a chunk's memory stands for all text before it, and replaces earlier memory.
        place: one of :data:`PLACES`.
        unread: number of chunks, from the first on, whose text is left out: only their memory is fed.
    """
    lengths = torch.tensor(list(chunks), dtype=torch.long)
    ends = torch.cumsum(lengths, 0)
    closed = int(ends[-1]) if len(chunks) else 0
    runs: list[tuple[Tensor, ...]] = []  # kind, raw, segment, row, position

    def add(kind: int, segment: int, raw: Tensor, row: Tensor, position: Tensor) -> None:
        runs.append((torch.full_like(raw, kind), raw, torch.full_like(raw, segment), row, position))

    counted = 0  # places taken by the memory of earlier chunks, if places are counted from 0
    for chunk, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
        start = end - length
        text = torch.arange(start, end)
        base = counted if place == "own" else start
        if chunk >= unread:
            add(TEXT, chunk, text, torch.full_like(text, -1), text - start + base)
        every = torch.arange(n_comp)
        if place == "own":
            first = 0 if is_latest else counted
            where, counted = first + every, first + n_comp
        elif place == "end":
            where = torch.full_like(every, end - 1)
        else:
            where = start + ((every + 1) * length // n_comp - 1).clamp(min=0)
        add(COMP, chunk, torch.full_like(every, end - 1), chunk * n_comp + every, where)
    rest = torch.arange(closed, n)
    base = counted if place == "own" else closed
    add(TEXT, len(chunks), rest, torch.full_like(rest, -1), rest - closed + base)

    *fields, position = (torch.cat(column) for column in zip(*runs, strict=True))
    tokens = Tokens(torch.arange(len(position)), *fields)
    visibility = ChunkVisibility(
        len(chunks), text=True, memory=not is_latest, latest=is_latest, kind=COMP, reads=False
    )
    return Layout(
        tokens, position, visibility, n, next_segment=len(chunks), next_position=base + n - closed,
        written=tuple(chunks), unread=sum(chunks[:unread]),
    )
