"""SubGen (Zandieh et al., arXiv 2402.06082): clusters of keys, each an entry that stands for its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache.stored import gather_entries
from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, Merged, highest, removed_mask
from kvbench.methods.policies.random import random_numbers

AT_ONCE = 1024
"""Number of entries whose distances to others are computed at a time."""
ROUND = 4
"""At most one in so many leaves in a round."""


@dataclass(frozen=True)
class SubGen(CachePolicy):
    """Keeps the first ``sinks`` entries, a window, and clusters of the others, kept(n, r) together.

    ``share`` per cent of what is kept is window. Of the others, the clusters so far included, those leave at a removal
    whose rotated keys are nearest to that of an earlier one, and each joins the nearest that stays; if more than a
    quarter have to leave, they do so in rounds. A cluster is one entry: the mean of its tokens' keys and of their
    values (``estimate=centroid``), or the key and value of one of its tokens, drawn uniformly (``estimate=sample``).
    A cluster of n tokens takes n times the attention of an entry (``count=false``: of one): the entry is exact where
    its tokens have the same key. The counts are stored, 4 bytes per entry and head, and counted among the bytes.

    A rule after the paper, which clusters token by token by a threshold on distances (here the number of clusters is
    given), and estimates numerator and denominator of attention from samples of their own, so that the estimate is
    unbiased; no code was found. The greedy k-centre rule chose no better centres on books, and takes longer.
    """

    name = "subgen"
    summary = "the 4 first entries, a window, and clusters of the other keys that count as often as they have tokens"
    paper = "arXiv 2402.06082"
    budgets = ("ratio", "tokens")  # a number of bytes would have to leave room for the counts

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
        centres = far_apart(view.keys[:, :, self.sinks : stop], keep - self.sinks - (view.entries - stop))
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


def far_apart(points: Tensor, count: int) -> Tensor:
    """Choose points that are far from each other: those nearest to an earlier one leave, a quarter at most in a round.

    Args:
        points: ``[batch, heads, points, width]``.

    Returns:
        int64 ``[batch, heads, count]``, indices of the points that stay, ascending.
    """
    index = torch.arange(points.shape[2], device=points.device).expand(points.shape[:3])
    while (number := points.shape[2]) > count:
        stay = highest(_to_earlier(points.float()), max(count, number - max(1, number // ROUND)))
        points, index = gather_entries(points, stay), index.gather(-1, stay)
    return index


def _to_earlier(points: Tensor) -> Tensor:
    """float32 ``[batch, heads, points]``: squared distance of each point to the nearest earlier one; infinite first."""
    squares, found = points.square().sum(-1), []
    place = torch.arange(points.shape[2], device=points.device)
    for start in range(0, points.shape[2], AT_ONCE):
        stop = min(points.shape[2], start + AT_ONCE)
        products = points[:, :, start:stop] @ points[:, :, :stop].transpose(-1, -2)
        apart = squares[:, :, None, :stop] - 2 * products
        hidden = place[:stop] >= place[start:stop, None]
        found.append(apart.masked_fill_(hidden, float("inf")).amin(-1) + squares[..., start:stop])
    return torch.cat(found, -1)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """int64 ``[batch, heads, points]``: for each point ``[batch, heads, points, width]`` the index of its nearest
    centre ``[batch, heads, centres, width]``."""
    spread = centres.float().transpose(-1, -2)
    half = centres.float().square().sum(-1)[..., None, :] / 2
    found = [(half - part.float() @ spread).argmin(-1) for part in torch.split(points, AT_ONCE, 2)]
    return torch.cat(found, -1)
