"""Mean pooling: memory without trained parameters."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.methods.layouts.chunked import ChunkVisibility, Pool
from kvbench.methods.layouts.chunks import Chunked
from kvbench.methods.layouts.layout import SUM
from kvbench.methods.options import option


@dataclass(frozen=True)
class MeanPool(Chunked):
    """Each memory entry is the mean of the keys and values over a run of its chunk's tokens; no parameters.

    Keys are averaged as cached, or before the rotary embedding (``merge_at=unrotated``). With ``count=true`` the mean
    of n entries takes n times the attention: log n is added to its logit.
    """

    name = "meanpool"
    summary = "the mean of the entries of each run of a chunk: no parameters"

    n_comp: int = option(2, "entries that are made of a chunk", least=1, most=32)
    merge_at: str = option(
        "rotated", "whether keys are averaged as cached or before their rotation", choices=("rotated", "unrotated")
    )
    count: bool = option(False, "an entry takes the attention of all it was made of", later=True)

    @property
    def averages_pre_rope(self) -> bool:
        return self.merge_at == "unrotated"

    def visibility(self, chunks: int) -> ChunkVisibility:
        return ChunkVisibility(chunks, text=True, memory=True, latest=False, kind=SUM)

    def merge_rule(self) -> Pool:
        return Pool(self.averages_pre_rope, self.count)
