"""LoRC (arXiv 2410.03111): low-rank projections of keys and values. Shows their quality only: nothing is removed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from kvbench.methods.base import Effect
from kvbench.methods.policies.low_rank import columns_of, low_rank
from kvbench.methods.policies.policy import CachePolicy


@dataclass(frozen=True)
class LoRC(CachePolicy):
    """Computes keys and values with low-rank weights, so that a cache could store fewer numbers per entry.

    The ratio is what such a cache would save: of the d numbers of all heads it would store kept(d, r), the rank. Here
    entries are stored in full, and the table shows no saving: with rotary embeddings, keys would have to be
    reconstructed and rotated again at every step. Departure: the same rank in every layer, where the published method
    gives shallow layers a higher one, by the condition numbers of the layers after them.
    """

    name = "lorc"
    summary = "keys and values by weights of low, uniform rank: the quality of it, nothing is removed yet"
    note = "uniform rank"
    paper = "arXiv 2410.03111"
    budgets = ("ratio",)
    effect = Effect.COMPUTES_LESS

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        return read

    def patched(self, model: nn.Module) -> AbstractContextManager[None]:
        size = columns_of(model)
        return low_rank(model, max(1, size - int(self.ratio * size)))
