"""Layouts of text in chunks, each compressed into a few entries, and how entries are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvbench.methods.layouts.layout import COMP, SUM, TEXT, Layout, MergePlan, Tokens


def equal_chunks(n: int, chunk: int, n_comp: int) -> list[int]:
    """Chunk lengths for ``n`` tokens of running text; a shorter last chunk only if compressing it saves entries."""
    lengths = [chunk] * (n // chunk)
    if n % chunk > n_comp:
        lengths.append(n % chunk)
    return lengths


@dataclass(frozen=True)
class ChunkVisibility:
    """Which tokens attend to the memory of earlier chunks; text after the last chunk always does.

    Attributes:
        chunks: number of chunks.
        text: whether text within the chunks does.
        memory: whether the COMP tokens do.
        latest: whether only the latest chunk's entries are memory, standing for all chunks before.
        kind: token kind of memory entries.
        reads: whether COMP tokens attend to the text of their chunk.
    """

    chunks: int
    text: bool
    memory: bool
    latest: bool
    kind: int
    reads: bool = True

    def __call__(self, queries: Tokens, keys: Tokens) -> Tensor:
        own = keys.segment == queries.segment
        before = keys.segment == queries.segment - 1
        memory = (keys.kind == self.kind) & (before if self.latest else ~own)
        after = queries.segment == self.chunks
        is_text, is_sum = queries.kind == TEXT, queries.kind == SUM
        sees = after | (is_text & self.text) | ((queries.kind == COMP) & self.memory) | (is_sum & before)
        own_text = (keys.kind == TEXT) & (self.reads | (queries.kind != COMP))
        own_kinds = own_text | ((keys.kind == COMP) & ~is_text)
        return (own & own_kinds) | (memory & sees)


def chunk_layout(
    n: int, chunks: Sequence[int], n_comp: int, visibility: ChunkVisibility, rule: Merge | Pool | None
) -> Layout:
    """The sequence chunk, its memory tokens, chunk, ... and the rest of the text, uncompressed.

    Positions of memory tokens continue from the last token of their chunk; text positions do not count memory tokens.
    """
    after = n - sum(chunks)
    special = [] if isinstance(rule, Pool) else [COMP]
    special += [] if rule is None else [SUM]
    runs: list[tuple[int, int, int]] = []  # (kind, segment, how many)
    for chunk, length in enumerate(chunks):
        runs.append((TEXT, chunk, length))
        runs += [(made, chunk, n_comp) for made in special]
    runs.append((TEXT, len(chunks), after))
    counts = torch.tensor([count for _, _, count in runs])
    kind, segment = (
        torch.repeat_interleave(torch.tensor([run[i] for run in runs]), counts) for i in (0, 1)
    )
    raw = torch.clamp(torch.cumsum(kind == TEXT, 0) - 1, min=0)
    slot = torch.arange(len(kind))
    begins = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    row = torch.where(kind == TEXT, -1, slot - begins)
    # Pooled entries take the position of the last token of their chunk.
    position = raw if isinstance(rule, Pool) else raw + row + 1
    tokens = Tokens(slot, kind, raw, segment, row)
    return Layout(
        tokens, position, visibility, n, next_segment=len(chunks),
        merge_plan=None if rule is None else rule.of(tokens, list(chunks), n_comp),
    )


@dataclass(frozen=True)
class Merge:
    """``SUM_t = (1 - a_t) SUM_(t-1) + a_t COMP_t``: a running mean (a_t = 1/t) or an exponential one (1/2).

    Attributes:
        counts: whether ``SUM_t`` takes as much attention as the t entries that it was made of.
    """

    ema: bool
    unrotated: bool
    counts: bool = False

    def of(self, tokens: Tokens, chunks: list[int], n_comp: int) -> MergePlan:
        slots = tokens.slot[tokens.kind == SUM].view(-1, n_comp)
        fresh = tokens.slot[tokens.kind == COMP].view(-1, n_comp)
        before = torch.cat([fresh[:1], slots[:-1]])
        step = torch.arange(1, len(slots) + 1, dtype=torch.float32)
        share = torch.full_like(step, 0.5) if self.ema else 1 / step
        share[:1] = 1.0
        weights = torch.stack([1 - share, share], -1)[:, None].expand(-1, n_comp, -1)
        sources = torch.stack([before, fresh], -1)
        counts = step.repeat_interleave(n_comp) if self.counts else None
        return MergePlan(slots.flatten(), sources.flatten(0, 1), weights.flatten(0, 1), self.unrotated, counts)


@dataclass(frozen=True)
class Pool:
    """Each memory entry is the mean of one of ``n_comp`` equal runs of its chunk's tokens.

    Attributes:
        counts: whether it takes as much attention as they would.
    """

    unrotated: bool
    counts: bool = False

    def of(self, tokens: Tokens, chunks: list[int], n_comp: int) -> MergePlan:
        slots = tokens.slot[tokens.kind == SUM]
        first_of = torch.nonzero(tokens.kind == TEXT).flatten()
        sources, weights, begin = [], [], 0
        widest = max((-(-length // n_comp) for length in chunks), default=1)
        for length in chunks:
            edges = [begin + length * k // n_comp for k in range(n_comp + 1)]
            for first, last in pairwise(edges):
                start = min(first, begin + length - 1)  # a chunk may have fewer tokens than entries
                run = first_of[start : max(last, start + 1)]
                sources.append(torch.nn.functional.pad(run, (0, widest - len(run)), value=int(run[0])))
                weights.append(torch.nn.functional.pad(torch.full((len(run),), 1 / len(run)), (0, widest - len(run))))
            begin += length
        if not sources:
            return MergePlan(slots, slots[:, None], torch.ones(0, 1), self.unrotated)
        shares = torch.stack(weights)
        counts = (shares > 0).sum(1).float() if self.counts else None
        return MergePlan(slots, torch.stack(sources), shares, self.unrotated, counts)
