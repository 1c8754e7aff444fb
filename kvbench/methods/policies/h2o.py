"""H2O (arXiv 2306.14048): heavy hitters by accumulated attention, and a recent window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvbench.methods.policies.policy import CachePolicy, LayerView, Needs, protect_last


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Keeps the entries with the most attention, summed over all queries so far, and as many recent ones.

    Each of the two groups is half of the budget. Attention is summed over the query heads of each key-value head and,
    as published, not divided by the number of queries that could see an entry.
    """

    name = "h2o"
    summary = "the entries with the most attention so far, and as many recent ones"
    paper = "arXiv 2306.14048"
    needs = Needs(attention=True)

    def recent(self, read: int) -> int:
        """Number of recent entries that are kept."""
        return self.held_after(read) // 2

    def scores(self, view: LayerView) -> Tensor:
        return protect_last(view.attention_sums, self.recent(view.read))
