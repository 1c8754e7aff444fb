"""LoRC (arXiv 2410.03111): projections of keys and values of low rank. Its quality only: nothing is removed here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from kvbench.methods.base import Effect
from kvbench.methods.policies.low_rank import columns_of, low_rank
from kvbench.methods.policies.policy import CachePolicy


@dataclass(frozen=True)
class LoRC(CachePolicy):
    """Computes keys and values by weights of low rank, so that a cache could hold fewer numbers per entry.

    The ratio is what such a cache would remove: of the d numbers of all heads it would hold kept(d, r), the rank.
    Here entries are stored whole, and the table shows no saving: with rotary positions the keys would have to be
    expanded and rotated anew at every step. Departure: the same rank in every layer, where the published
    method gives shallow layers more, by the condition numbers of those behind them.
    """

    name = "lorc"
    summary = "keys and values by weights of low, uniform rank: the quality of it, nothing is removed yet"
    note = "uniform rank"
    paper = "arXiv 2410.03111"
    budgets = ("ratio",)
    effect = Effect.COMPUTES_LESS

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        return read

    def on(self, model: nn.Module) -> AbstractContextManager[None]:
        size = columns_of(model)
        return low_rank(model, max(1, size - int(self.ratio * size)))
