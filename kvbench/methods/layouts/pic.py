"""Memory tokens that see their own chunk only, after PIC (arXiv 2602.13980)."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.methods.layouts.chunked import ChunkVisibility
from kvbench.methods.layouts.chunks import Chunked
from kvbench.methods.layouts.layout import COMP
from kvbench.methods.options import option


@dataclass(frozen=True)
class PIC(Chunked):
    """Memory tokens that each see their own chunk only, after PIC (arXiv 2602.13980).

    The abstract does not say whether they also see earlier memory; with ``sees=memory`` they do.
    """

    name = "pic"
    summary = "memory entries whose tokens see their own chunk only"
    paper = "after arXiv 2602.13980"
    adapter_kinds = ("gated", "plain", "full")

    sees: str = option("chunk", "what memory tokens see besides each other", choices=("chunk", "memory"), trained=True)

    def visibility(self, chunks: int) -> ChunkVisibility:
        return ChunkVisibility(chunks, text=True, memory=self.sees == "memory", latest=False, kind=COMP)
