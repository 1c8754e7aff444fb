"""SubGen (Zandieh et al., arXiv 2402.06082): clusters of keys, each an entry that stands for its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache.stored import gather_entries
from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, Merged, removed_mask
from kvbench.methods.policies.random import random_numbers

AT_ONCE = 1024
"""Number of entries whose distances to all centres are computed at a time."""


@dataclass(frozen=True)
class SubGen(CachePolicy):
    """Keeps the first ``sinks`` entries, a window, and clusters of the others, kept(n, r) together.

    ``share`` per cent of what is kept is window. The others, and the clusters so far, are clustered anew at every
    removal by the greedy k-centre rule on their rotated keys: the first is a centre, then always the one farthest from
    its nearest centre; each joins its nearest centre. A cluster is one entry: the mean of its tokens' keys and of their
    values (``estimate=centroid``), or the key and value of one of its tokens, drawn uniformly (``estimate=sample``).
    A cluster of n tokens takes n times the attention of an entry (``count=false``: of one): the entry is exact where
    its tokens have the same key. The counts are stored, 4 bytes per entry and head, and counted among the bytes.

    Departures: the paper clusters online by a threshold on distances, and estimates numerator and denominator of
    attention from samples of their own, so that the estimate is unbiased; its text says less than is needed to rebuild
    its experiments, and no code was found. This is a rule after it.
    """

    name = "subgen"
    summary = "the 4 first entries, a window, and clusters of the other keys that count as often as they have tokens"
    paper = "arXiv 2402.06082"

    sinks: int = option(4, "first entries that stay")
    share: int = option(50, "per cent of what is kept that is the window", most=95)
    estimate: str = option("centroid", "what a cluster is stored as", choices=("centroid", "sample"))
    count: bool = option(True, "whether a cluster takes attention for each of its tokens")

    @property
    def weighs(self) -> bool:
        return self.count

    def window_of(self, keep: int) -> int:
        """Number of last entries that are kept as they are; there is room for a cluster beside them."""
        return min(keep * self.share // 100, keep - self.sinks - 1)

    def chosen(self, view: LayerView, keep: int) -> Tensor:
        stop = view.entries - self.window_of(keep)
        centres = farthest_first(view.keys[:, :, self.sinks : stop].float(), keep - self.sinks - (view.entries - stop))
        index = torch.arange(view.entries, device=view.keys.device).expand(view.keys.shape[:3])
        return torch.cat([index[..., : self.sinks], self.sinks + centres, index[..., stop:]], -1)

    def merged(self, view: LayerView, entries: Tensor) -> Merged:
        keep = entries.shape[-1]
        centres = entries[..., self.sinks : keep - self.window_of(keep)]
        removed = removed_mask(view, entries).int()
        gone = removed.sort(dim=-1, descending=True, stable=True).indices[..., : view.entries - keep]
        target = centres.gather(-1, nearest(gather_entries(view.keys, gone), gather_entries(view.keys, centres)))
        weights = torch.ones_like(view.positions, dtype=torch.float32) if view.weights is None else view.weights
        total = weights.scatter_add(-1, target, weights.gather(-1, gone))
        if self.estimate == "sample":
            return self._with_samples(view, entries, gone, target, total)

        def mean(tensor: Tensor) -> Tensor:
            weighed = tensor.float() * weights[..., None]
            index = target[..., None].expand(*target.shape, tensor.shape[-1])
            summed = weighed.scatter_add(-2, index, gather_entries(weighed, gone))
            return (summed / total[..., None]).to(tensor.dtype)

        return Merged(mean(view.keys), mean(view.values), weights=total)

    def _with_samples(self, view: LayerView, entries: Tensor, gone: Tensor, target: Tensor, total: Tensor) -> Merged:
        """Every token has a number at random; a cluster is stored as the token with the highest one."""
        numbers = random_numbers(view)
        if view.carried is not None:
            numbers = torch.cat([view.carried, numbers[..., view.carried.shape[-1] :]], -1)
        highest = numbers.scatter_reduce(-1, target, numbers.gather(-1, gone), "amax")
        index = torch.arange(view.entries, device=numbers.device).expand(numbers.shape)
        wins = numbers.gather(-1, gone) == highest.gather(-1, target)
        source = index.scatter_reduce(-1, target, torch.where(wins, gone, -1), "amax")
        source = torch.where(numbers == highest, index, source)  # the centre itself has it
        return Merged(
            gather_entries(view.keys, source), gather_entries(view.values, source), highest.gather(-1, entries), total
        )


def farthest_first(points: Tensor, count: int) -> Tensor:
    """Greedy k-centre: the first point, then always the one farthest from the nearest of those taken.

    Args:
        points: float32 ``[batch, heads, points, width]``.

    Returns:
        int64 ``[batch, heads, count]``, indices of the points taken, ascending.
    """
    squares = points.square().sum(-1)
    apart = torch.full_like(squares, float("inf"))
    taken = torch.zeros_like(squares, dtype=torch.bool)
    last = torch.zeros(*squares.shape[:2], 1, dtype=torch.long, device=points.device)
    for _ in range(count):
        taken.scatter_(-1, last, True)
        centre = gather_entries(points, last)
        distance = torch.baddbmm(
            squares.flatten(0, 1)[..., None], points.flatten(0, 1), centre.flatten(0, 1).transpose(-1, -2), alpha=-2
        ).view(squares.shape) + squares.gather(-1, last)
        apart = torch.minimum(apart, distance)
        last = apart.masked_fill(taken, float("-inf")).argmax(-1, keepdim=True)
    return taken.nonzero()[:, -1].view(*squares.shape[:2], count)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """int64 ``[batch, heads, points]``: for each point ``[batch, heads, points, width]`` the index of its nearest
    centre ``[batch, heads, centres, width]``."""
    spread = centres.float().transpose(-1, -2)
    half = centres.float().square().sum(-1)[..., None, :] / 2
    found = [(half - part.float() @ spread).argmin(-1) for part in torch.split(points, AT_ONCE, 2)]
    return torch.cat(found, -1)
