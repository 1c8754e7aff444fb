"""H2O (arXiv 2306.14048): heavy hitters of the attention so far, and a window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvbench.methods.policies.policy import CachePolicy, LayerView, Needs, protect_last


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Holds the entries with the most attention, summed over all queries so far, and as many recent ones.

    Each is half of the budget. Sums are those of the query heads of each head together, and are not divided by how
    many queries could see an entry, as published.
    """

    name = "h2o"
    summary = "the entries with the most attention so far, and as many recent ones"
    paper = "arXiv 2306.14048"
    needs = Needs(attention=True)

    def recent(self, read: int) -> int:
        """Recent entries that stay."""
        return self.held_after(read) // 2

    def scores(self, view: LayerView) -> Tensor:
        return protect_last(view.attention_sums, self.recent(view.read))
