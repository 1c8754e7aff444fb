"""Methods that merge what they remove into what stays: CaM (ICML 2024) and D2O (arXiv 2406.13035)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache.packed import taken
from kvbench.methods.base import Option
from kvbench.methods.h2o import H2o
from kvbench.methods.policy import Policy, View, protect_first
from kvbench.methods.random_policy import drawn


@dataclass(frozen=True)
class Cam(Policy):
    """Holds the first ``sinks`` entries and the most recent, and spreads the values of others over those behind.

    A removed entry is merged with the probability a / b, at most 1, where a is the attention that it received per
    query that could see it, and b the mean of the same over the ``spread`` oldest recent entries; its value, divided
    by how many they are, is added to each of theirs. A prefix that is compressed at once is not merged, since the
    values of hundreds of entries would add up in a few: the method merges as text goes on. The published code masks
    what it removes and frees nothing.
    """

    name = "cam"
    summary = "the 4 first entries and a window; values of others are spread over the next ones"
    paper = "CaM, ICML 2024"
    sums = True
    known = Policy.known | {"sinks": Option("4", least=1), "spread": Option("32", least=1)}

    def merged(self, view: View, entries: Tensor) -> tuple[Tensor, Tensor]:
        lost = _lost(view, entries)
        target = entries[..., self.sinks : self.sinks + self.number("spread")]
        if not target.shape[-1] or view.entries - entries.shape[-1] > self.number("step"):
            return view.keys, view.values
        attention = view.sums / (view.read - view.positions)
        usual = attention.gather(-1, target).mean(-1, keepdim=True)
        merges = lost & (drawn(view) < attention / usual)
        total = (view.values.float() * merges[..., None]).sum(-2, keepdim=True) / target.shape[-1]
        index = target[..., None].expand(*target.shape, view.values.shape[-1])
        added = torch.zeros_like(view.values).scatter_(-2, index, total.to(view.values.dtype).expand(index.shape))
        return view.keys, view.values + added


@dataclass(frozen=True)
class D2o(H2o):
    """As H2O, with the first ``sinks`` entries kept, and what is removed merged into the entry with the nearest key.

    It is, where the cosine of the keys is at least the mean of the highest cosines of what is removed now; keys and
    values become the mean of their own and of what is merged, each weighted by its cosine. Departures: every layer
    gets the same budget, where the published code gives more to some; the threshold is that of one removal, where
    it is a moving average there.
    """

    name = "d2o"
    summary = "as h2o; what is removed is merged into the entry with the key most like its own"
    paper = "arXiv 2406.13035"
    known = H2o.known | {"sinks": Option("4")}

    def recent(self, read: int) -> int:
        return min(super().recent(read), max(0, self.held_after(read) - self.sinks))

    def scores(self, view: View) -> Tensor:
        return protect_first(super().scores(view), view.positions, self.sinks)

    def merged(self, view: View, entries: Tensor) -> tuple[Tensor, Tensor]:
        lost = _lost(view, entries)
        count = view.entries - entries.shape[-1]
        gone = lost.int().sort(dim=-1, descending=True, stable=True).indices[..., :count]
        keys = functional.normalize(view.keys.float(), dim=-1)
        cosine, nearest = (taken(keys, gone) @ taken(keys, entries).transpose(-1, -2)).max(-1)
        weight = cosine * (cosine >= cosine.mean(-1, keepdim=True))
        target = entries.gather(-1, nearest)
        one = torch.ones_like(view.sums).scatter_add_(-1, target, (weight > 0).float())
        merged = []
        for tensor in (view.keys, view.values):
            index = target[..., None].expand(*target.shape, tensor.shape[-1])
            total = tensor.float().scatter_add(-2, index, taken(tensor, gone).float() * weight[..., None])
            merged.append((total / one[..., None]).to(tensor.dtype))
        return merged[0], merged[1]


def _lost(view: View, entries: Tensor) -> Tensor:
    """bool ``[batch, heads, entries]``: what does not stay."""
    return torch.ones_like(view.positions, dtype=torch.bool).scatter_(-1, entries, False)
