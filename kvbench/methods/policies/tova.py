"""TOVA (arXiv 2401.06104): entries that the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kvbench.methods.policies.policy import CachePolicy, LayerView


@dataclass(frozen=True)
class TOVA(CachePolicy):
    """Keeps the entries that the last query attends to most, averaged over all heads: the same set for all of them.

    No sinks and no window are protected; the newest entry is kept only if its own attention suffices.
    """

    name = "tova"
    summary = "the entries that the last query attends most, over all heads"
    paper = "arXiv 2401.06104"
    shares_heads = True

    window: int = field(default=1, kw_only=True)

    def scores(self, view: LayerView) -> Tensor:
        return view.mean_attention(1)
