"""AdaKV (arXiv 2407.11550): the budget of a layer is divided among its heads by need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import LayerView
from kvbench.methods.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV with a budget per head: a layer's entries are divided among its heads by the highest scores of all heads.

    Before the window, the budget of a head is ``floor`` per cent of an even share, plus the remaining per cent of the
    number of entries that it has among the highest scores of the layer; entries lost to rounding go to the next highest
    scores. Heads with a smaller budget store fewer entries: the layer is ragged, and its bytes fall (the published code
    needs a custom kernel for this; kvpress masks and frees nothing).
    """

    name = "adakv"
    summary = "as snapkv, with the budget of a layer shared among its heads by need"
    paper = "arXiv 2407.11550"

    floor: int = option(50, "per cent of an even share that every head gets", most=100)

    def chosen(self, view: LayerView, keep: int) -> Tensor:
        there = view.positions >= 0
        window = min(self.window, keep)
        recent = torch.arange(view.entries, device=there.device) >= view.entries - window
        open_ = there & ~recent
        worth = self._worth(view).masked_fill(~open_, float("-inf"))
        even, heads = keep - window, worth.shape[1]
        share = self.floor
        have = open_.sum(-1)
        best = _best(worth.flatten(1), heads * even).view_as(worth)
        caps = ((100 - share) * best.sum(-1) + share * even) // 100
        given = _ranks(worth) < torch.minimum(caps, have)[..., None]
        last = _best(worth.masked_fill(given, float("inf")).flatten(1), heads * even).view_as(worth)
        return _places((last | recent) & there)


def _ranks(scores: Tensor) -> Tensor:
    """Rank of each entry: the number of higher scores in the last dimension; of equal scores the later is higher."""
    order = (scores.shape[-1] - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices)
    return order.argsort(-1)


def _best(scores: Tensor, count: int) -> Tensor:
    """bool, True at the ``count`` highest scores of each row; entries with a score of -inf are never chosen."""
    return (_ranks(scores) < count) & (scores > float("-inf"))


def _places(chosen: Tensor) -> Tensor:
    """Indices int64 ``[batch, heads, most]`` of bool ``[batch, heads, entries]``: ascending, -1 in front as padding."""
    places = torch.arange(chosen.shape[-1], device=chosen.device).expand(chosen.shape)
    ordered = places.masked_fill(~chosen, -1).sort(-1).values
    return ordered[..., chosen.shape[-1] - int(chosen.sum(-1).max()) :]
