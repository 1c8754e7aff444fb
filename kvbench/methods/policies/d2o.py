"""Methods that merge what they remove into what stays: CaM (ICML 2024) and D2O (arXiv 2406.13035)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache.stored import taken
from kvbench.methods.base import Option
from kvbench.methods.policies.h2o import H2o
from kvbench.methods.policies.policy import Merged, Policy, View, protect_first
from kvbench.methods.policies.random import drawn


@dataclass(frozen=True)
class Cam(Policy):
    """Holds the first ``sinks`` entries and the most recent, kept(N, r) together; values of others are spread.

    That constant number is StreamingLLM's, at absolute positions; after a prefix of P tokens it stays at kept(P, r).
    A removed entry is merged with the probability a / b, at most 1, where a is the attention that it received per
    query that could see it, and b the mean of the same over the ``spread`` entries behind it; then a ``spread``-th of
    its value is added to each of theirs. Departures: of the published codes one takes the attention of the last query
    alone, and b over the whole window, another the sums of all queries, over 16 entries; a prefix that is compressed
    at once is not merged, since the values of hundreds of entries would add up in a few; all that go together are
    merged into the same entries (``step=1``: one by one, as published). The former masks what it removes and frees
    nothing.
    """

    name = "cam"
    summary = "the 4 first entries and a window, kept(N, r) together; values of others are spread over the next ones"
    paper = "CaM, ICML 2024"
    version = 2
    sums = True
    known = Policy.known | {"sinks": Option("4", least=1), "spread": Option("32", least=1)}

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        return self.constant(total)

    def merged(self, view: View, entries: Tensor) -> Merged:
        spread = self.number("spread")
        target = entries[..., self.sinks : self.sinks + spread]
        if not target.shape[-1] or view.entries - entries.shape[-1] > self.number("step"):
            return Merged(view.keys, view.values)
        attention = view.sums / (view.read - view.positions)
        usual = attention.gather(-1, target).mean(-1, keepdim=True)
        merges = _lost(view, entries) & (drawn(view) < attention / usual)
        share = (view.values.float() * merges[..., None]).sum(-2, keepdim=True) / spread
        index = target[..., None].expand(*target.shape, view.values.shape[-1])
        added = torch.zeros_like(view.values).scatter_(-2, index, share.to(view.values.dtype).expand(index.shape))
        return Merged(view.keys, view.values + added)


@dataclass(frozen=True)
class D2o(H2o):
    """As H2O, with the first ``sinks`` entries kept, and what is removed merged into the entry with the nearest key.

    It is, where the cosine of the keys is at least a threshold: one number per layer of a text, which moves half way
    to the mean of these cosines, over all heads and entries, at every removal; at the first one it is that mean. Keys
    and values (``merge=values``: values alone) become the mean of their own and of what is merged, each weighted by
    its cosine. Departures: every layer gets the same budget, where the published code gives more to some; an entry is
    merged by its own cosine, where the published code merges the j-th of all heads by the mean of theirs.
    """

    name = "d2o"
    summary = "as h2o; what is removed is merged into the entry with the key most like its own"
    paper = "arXiv 2406.13035"
    version = 2
    known = H2o.known | {"sinks": Option("4"), "merge": Option("both", ("both", "values"))}

    def recent(self, read: int) -> int:
        return min(super().recent(read), max(0, self.held_after(read) - self.sinks))

    def scores(self, view: View) -> Tensor:
        return protect_first(super().scores(view), view.positions, self.sinks)

    def merged(self, view: View, entries: Tensor) -> Merged:
        lost = _lost(view, entries)
        count = view.entries - entries.shape[-1]
        gone = lost.int().sort(dim=-1, descending=True, stable=True).indices[..., :count]
        unit = functional.normalize(view.keys.float(), dim=-1)
        cosine, nearest = (taken(unit, gone) @ taken(unit, entries).transpose(-1, -2)).max(-1)
        usual = cosine.mean((1, 2))
        threshold = usual if view.carried is None else (view.carried + usual) / 2
        merges = cosine >= threshold[:, None, None]
        weight, target = cosine * merges, entries.gather(-1, nearest)
        number = torch.ones_like(view.sums).scatter_add_(-1, target, merges.float())

        def with_merged(tensor: Tensor) -> Tensor:
            index = target[..., None].expand(*target.shape, tensor.shape[-1])
            total = tensor.float().scatter_add(-2, index, taken(tensor, gone).float() * weight[..., None])
            return (total / number[..., None]).to(tensor.dtype)

        keys = with_merged(view.keys) if self.option("merge") == "both" else view.keys
        return Merged(keys, with_merged(view.values), threshold)


def _lost(view: View, entries: Tensor) -> Tensor:
    """bool ``[batch, heads, entries]``: what does not stay."""
    return torch.ones_like(view.positions, dtype=torch.bool).scatter_(-1, entries, False)
