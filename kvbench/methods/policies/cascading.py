"""Cascading KV cache (arXiv 2406.17808): sub-caches that let through ever fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, Needs


@dataclass(frozen=True)
class Cascading(CachePolicy):
    """Holds the first ``sinks`` entries and a chain of ``caches``, kept(N, r) together, a constant number.

    The newest sub-cache takes every token. What falls out of one is offered to the next, and sub-cache i takes what
    it is offered once in 2^i tokens; at other times the offered entry and the newest of that sub-cache compete, and
    the one with more attention stays. So the same entries reach back 2^caches - 1 times as far as a window of one
    sub-cache. Sub-caches are filled before anything is thinned; positions are counted in the cache
    (``positions=absolute``: in the text), and attention is a moving sum per head. Attention is that of the moment of
    removal, after every ``step`` tokens, where the published code compares after every one.
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
        """The place ``[batch, heads, 1]`` in ``alive`` of the entry that a new token, the ``push``-th, pushes out."""
        sinks, caches = self.sinks, self.caches
        taking = min(caches, (push & -push).bit_length())  # sub-caches that take a token now, the newest first
        if taking == caches:
            return alive.new_full((*alive.shape[:2], 1), sinks)
        newer = sum((keep - sinks + i) // caches for i in range(taking))  # entries of the taking sub-caches
        newest = keep - newer - 1  # of the sub-cache that does not take one; the offered entry is the next
        pair = sums.gather(-1, alive[..., newest : newest + 2])
        return newest + (pair[..., 1:] < pair[..., :1]).long()


def _without(alive: Tensor, place: Tensor) -> Tensor:
    """``alive`` without one entry of each row and head."""
    index = torch.arange(alive.shape[-1] - 1, device=alive.device)
    return alive.gather(-1, index + (index >= place).long())
