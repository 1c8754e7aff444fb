"""CaM: cache merging (Zhang et al., ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, Merged, Needs, removed_mask
from kvbench.methods.policies.random import random_numbers


@dataclass(frozen=True)
class CaM(CachePolicy):
    """Keeps the first ``sinks`` entries and the most recent, kept(N, r) together; adds values of others to them.

    The constant size is StreamingLLM's, at absolute positions; after a prefix of P tokens it stays at kept(P, r). A
    removed entry is merged with probability min(1, a / b), where a is the attention that it received per query that
    could see it, and b the mean of the same over the next ``spread`` kept entries; then 1 / ``spread`` of its value is
    added to the value of each of these. Departures: of the published codes, one takes the attention of the last query
    alone, and b over the whole window, another the sums of all queries, over 16 entries; a prefix that is compressed at
    once is not merged, since the values of hundreds of entries would add up in a few; all entries that are removed
    together are merged into the same entries (``step=1``: one by one, as published). The first of these codes masks
    what it removes and frees nothing.
    """

    name = "cam"
    summary = "the 4 first entries and a window, kept(N, r) together; values of others are spread over the next ones"
    paper = "CaM, ICML 2024"
    version = 2
    needs = Needs(attention=True)

    sinks: int = option(4, "first entries that stay", least=1)
    spread: int = option(32, "entries that a value is spread over", least=1)

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        return self.constant(total)

    def merged(self, view: LayerView, entries: Tensor) -> Merged:
        spread = self.spread
        target = entries[..., self.sinks : self.sinks + spread]
        if not target.shape[-1] or view.entries - entries.shape[-1] > self.step:
            return Merged(view.keys, view.values)
        attention = view.attention_sums / (view.read - view.positions)
        usual = attention.gather(-1, target).mean(-1, keepdim=True)
        merges = removed_mask(view, entries) & (random_numbers(view) < attention / usual)
        share = (view.values.float() * merges[..., None]).sum(-2, keepdim=True) / spread
        index = target[..., None].expand(*target.shape, view.values.shape[-1])
        added = torch.zeros_like(view.values).scatter_(-2, index, share.to(view.values.dtype).expand(index.shape))
        return Merged(view.keys, view.values + added)
