"""Cascading KV cache (arXiv 2406.17808): a chain of sub-caches that accept fewer and fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, Needs


@dataclass(frozen=True)
class Cascading(CachePolicy):
    """Keeps the first ``sinks`` entries and a chain of ``caches`` sub-caches, kept(N, r) together, a constant number.

    The newest sub-cache accepts every token. An entry that drops out of one is offered to the next; sub-cache i accepts
    an offer once in 2^i tokens, and otherwise keeps whichever of the offered entry and its newest one has more
    attention. So the same number of entries reaches back 2^caches - 1 times as far as one sub-cache used as a window.
    No entry is removed before all sub-caches are full. Positions are counted in the cache (``positions=absolute``: in
    the text), and attention is an exponentially decaying sum per head. Entries are removed after every ``step`` tokens,
    by their attention at that moment; the published code compares after every token.
    """

    name = "cascading"
    summary = "the 4 first entries and sub-caches that let through ever fewer tokens, by attention"
    paper = "arXiv 2406.17808"
    position_rule = "cache"
    needs = Needs(attention=True, decay=0.9999)

    sinks: int = option(4, "first entries that stay")
    caches: int = option(4, "sub-caches", least=1, most=16)
    positions: str = option("cache", "where keys are taken to be", choices=("cache", "absolute"))

    @property
    def minimum(self) -> int:
        return self.sinks + self.caches

    @property
    def rerotated(self) -> int:
        return 1 << 40 if self.positions == "cache" else 0

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        return self.constant(total)

    def chosen(self, view: LayerView, keep: int) -> Tensor:
        alive = torch.arange(view.entries, device=view.keys.device).expand(view.keys.shape[:3])
        late = view.entries - keep
        for push in range(view.read - late - keep, view.read - keep):
            alive = _without(alive, self._dropped(alive, view.attention_sums, push + 1, keep))
        return alive

    def _dropped(self, alive: Tensor, sums: Tensor, push: int, keep: int) -> Tensor:
        """Index into ``alive``, ``[batch, heads, 1]``, of the entry that is evicted by the ``push``-th token."""
        sinks, caches = self.sinks, self.caches
        taking = min(caches, (push & -push).bit_length())  # sub-caches that accept an entry now, the newest first
        if taking == caches:
            return alive.new_full((*alive.shape[:2], 1), sinks)
        newer = sum((keep - sinks + i) // caches for i in range(taking))  # entries of the accepting sub-caches
        newest = keep - newer - 1  # of the next sub-cache, which does not accept; the offered entry follows
        pair = sums.gather(-1, alive[..., newest : newest + 2])
        return newest + (pair[..., 1:] < pair[..., :1]).long()


def _without(alive: Tensor, place: Tensor) -> Tensor:
    """``alive`` without one entry of each row and head."""
    index = torch.arange(alive.shape[-1] - 1, device=alive.device)
    return alive.gather(-1, index + (index >= place).long())
