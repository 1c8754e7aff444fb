"""D2O (Wan et al., arXiv 2406.13035)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache.stored import gather_entries
from kvbench.methods.options import option
from kvbench.methods.policies.h2o import H2O
from kvbench.methods.policies.policy import LayerView, Merged, protect_first, removed_mask


@dataclass(frozen=True)
class D2O(H2O):
    """H2O that keeps the first ``sinks`` entries, and merges removed entries into those with the most similar keys.

    An entry is merged if the cosine of the two keys reaches a threshold, one number per layer and text: at the first
    removal the mean of these cosines over all heads and entries, then half way from there to the new mean at every
    removal. Keys and values (``merge=values``: values alone) become the mean of the kept entry and of those merged into
    it, the latter weighted by their cosines. With ``count=true`` an entry into which n others were merged takes n + 1
    times the attention of one (as in ``subgen``; not in the paper). Departures: every layer gets the same budget, where
    the published code gives some layers more; an entry is merged by its own cosine, where the published code merges the
    j-th entry of all heads by the mean of their cosines.
    """

    name = "d2o"
    summary = "as h2o; what is removed is merged into the entry with the key most like its own"
    paper = "arXiv 2406.13035"
    version = 2

    sinks: int = option(4, "first entries that stay")
    merge: str = option("both", "what is merged", choices=("both", "values"))
    count: bool = option(False, "whether an entry takes attention for each that was merged into it", later=True)

    @property
    def weighs(self) -> bool:
        return self.count

    def recent(self, read: int) -> int:
        return min(super().recent(read), max(0, self.held_after(read) - self.sinks))

    def scores(self, view: LayerView) -> Tensor:
        return protect_first(super().scores(view), view.positions, self.sinks)

    def merged(self, view: LayerView, entries: Tensor) -> Merged:
        removed = removed_mask(view, entries)
        count = view.entries - entries.shape[-1]
        gone = removed.int().sort(dim=-1, descending=True, stable=True).indices[..., :count]
        unit = functional.normalize(view.keys.float(), dim=-1)
        cosine, nearest = (gather_entries(unit, gone) @ gather_entries(unit, entries).transpose(-1, -2)).max(-1)
        usual = cosine.mean((1, 2))
        threshold = usual if view.carried is None else (view.carried + usual) / 2
        merges = cosine >= threshold[:, None, None]
        weight, target = cosine * merges, entries.gather(-1, nearest)
        number = torch.ones_like(view.attention_sums).scatter_add_(-1, target, merges.float())

        def with_merged(tensor: Tensor) -> Tensor:
            index = target[..., None].expand(*target.shape, tensor.shape[-1])
            total = tensor.float().scatter_add(-2, index, gather_entries(tensor, gone).float() * weight[..., None])
            return (total / number[..., None]).to(tensor.dtype)

        keys = with_merged(view.keys) if self.merge == "both" else view.keys
        weights = None
        if self.count:
            weights = torch.ones_like(number) if view.weights is None else view.weights
            weights = weights.scatter_add(-1, target, weights.gather(-1, gone) * merges)
        return Merged(keys, with_merged(view.values), threshold, weights)
