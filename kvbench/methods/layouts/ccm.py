"""The Compressed Context Memory (Kim et al., ICLR 2024, arXiv 2312.03414)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvbench.methods.layouts.ccm_budget import StreamingBudget, budget_layout
from kvbench.methods.layouts.chunked import ChunkVisibility, Merge
from kvbench.methods.layouts.chunks import LONGEST, SHORTEST, Chunked
from kvbench.methods.layouts.layout import COMP, RUNNING, SUM, Layout, TextStructure
from kvbench.methods.options import option


@dataclass(frozen=True)
class Streaming(StreamingBudget, Chunked):
    """Base of both variants: memory is made after every chunk or, in the streaming form, whenever the cache is full."""

    def uses_ratio(self, in_chunks: bool) -> bool:
        return super().uses_ratio(in_chunks) and not self.streams

    def check(self, longest: int, in_chunks: bool) -> None:
        self.check_budget(self.n_comp, in_chunks)
        if not self.streams:
            super().check(longest, in_chunks)

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        if self.streams and not text.chunks:
            return budget_layout(self, n, self.n_comp, self.merge_rule(), reads=self.visibility(1).reads)
        return super().layout(n, rng, text)


@dataclass(frozen=True)
class CCMConcat(Streaming):
    """Compressed Context Memory, concatenated: ``n_comp`` entries for every chunk.

    COMP tokens after a chunk attend to the chunk, the memory of earlier chunks, and each other; their keys and values
    are the chunk's memory. With ``recurrent=false`` the text of a chunk and its COMP tokens attend to that chunk only,
    and only text after the last chunk attends to the memory.

    Departures from the released code: the loss is on all text (each chunk given the memory of those before it) instead
    of on answers only; the ratio sets the chunk length of running text. ``budget=160`` gives the published streaming
    form, with absolute positions.
    """

    name = "ccm-concat"
    summary = "a few trained memory entries per chunk, side by side"
    paper = "arXiv 2312.03414"
    adapter_kinds = ("gated", "plain", "full")

    recurrent: bool = option(True, "memory is made and read while chunks are read", trained=True)

    def visibility(self, chunks: int) -> ChunkVisibility:
        return ChunkVisibility(chunks, text=self.recurrent, memory=self.recurrent, latest=False, kind=COMP)


@dataclass(frozen=True)
class CCMMerge(Streaming):
    """Compressed Context Memory, merged: ``n_comp`` entries in total, however long the text.

    After each chunk the memory becomes the mean of all chunks' COMP entries (``merge=mean``) or half old and half new
    (``merge=ema``). Keys are averaged as cached, each with the rotary embedding of its own position, as published, or
    before the rotary embedding (``merge_at=unrotated``). SUM tokens are the slots that merged entries are written to;
    what the model computes at them is not used. Merged values are averages of values, also in the streaming form. With
    ``count=true`` (no part of the paper) the mean of t entries takes t times the attention: log t is added to its
    logit.
    """

    name = "ccm-merge"
    summary = "a few trained memory entries in all, merged after every chunk"
    paper = "arXiv 2312.03414"
    budgets = ()
    adapter_kinds = ("gated", "plain", "full")

    recurrent: bool = option(True, "memory is made and read while chunks are read", trained=True)
    merge: str = option("mean", "how chunks are merged", choices=("mean", "ema"), trained=True)
    merge_at: str = option(
        "rotated", "whether keys are averaged as cached or before their rotation", choices=("rotated", "unrotated"),
        trained=True,
    )
    count: bool = option(False, "a merged entry takes the attention of all it was made of", later=True)
    segment: int = option(64, "tokens of a chunk of running text", least=SHORTEST, most=LONGEST)

    @property
    def averages_pre_rope(self) -> bool:
        return self.merge_at == "unrotated"

    def chunk(self) -> int:
        return self.segment

    def visibility(self, chunks: int) -> ChunkVisibility:
        return ChunkVisibility(chunks, text=self.recurrent, memory=self.recurrent, latest=True, kind=SUM)

    def merge_rule(self) -> Merge:
        return Merge(self.merge == "ema", self.averages_pre_rope, self.count)
