"""SnapKV (arXiv 2404.14469), with the budgets of PyramidKV (2406.02069) and the chunks of ChunkKV (2502.00299)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.methods.base import Option
from kvbench.methods.policies.policy import Policy, View, check_kernel, check_room, protect_last

POOLS: dict[str, Callable[..., Tensor]] = {"mean": functional.avg_pool1d, "max": functional.max_pool1d}


@dataclass(frozen=True)
class SnapKv(Policy):
    """Holds the last ``window`` entries and those that their queries attend most, smoothed over ``kernel`` places.

    Attention is averaged over the queries of the window and the query heads of each head, so that what is stored is
    one set per head of keys. The published code stores a set per query head, which takes more memory. Published runs
    take the maximum over 7 places, as here; the class in that code has the mean over 5 (``pool=mean``, ``kernel=5``).
    """

    name = "snapkv"
    summary = "the last entries, and those that their queries attend most"
    paper = "arXiv 2404.14469"
    known = Policy.known | {
        "window": Option("32", least=1), "kernel": Option("7", least=1), "pool": Option("max", tuple(POOLS)),
    }

    @property
    def minimum(self) -> int:
        return self.looks_at + 1

    def check_kept(self, n: int) -> None:
        """A window that fills all that is kept is a plain window, whatever the method is called."""
        check_room(self, n, "window", "it would be a plain window")

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks)
        check_kernel(self)

    def scores(self, view: View) -> Tensor:
        return protect_last(self._worth(view), self.looks_at)

    def _worth(self, view: View) -> Tensor:
        """``[batch, heads, entries]``: attention before the window, smoothed; 0 within it."""
        before = max(0, view.entries - self.looks_at)
        worth = view.attention(self.looks_at).mean((2, 3))[..., :before]
        kernel, pool = self.number("kernel"), POOLS[self.option("pool")]
        if before:
            worth = pool(worth, kernel, stride=1, padding=kernel // 2)[..., :before]
        return functional.pad(worth, (0, view.entries - before))


@dataclass(frozen=True)
class PyramidKv(SnapKv):
    """SnapKV with more entries in early layers and fewer in late ones, falling evenly; the mean is the budget.

    The last layer gets 1 / ``beta`` of what all would get, the window apart, and the first as much more. Published
    runs pool as those of SnapKV, as here.
    """

    name = "pyramidkv"
    summary = "as snapkv, with more entries in early layers and fewer in late ones"
    paper = "arXiv 2406.02069"
    known = SnapKv.known | {"beta": Option("20", least=1)}

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        mean = self.held_after(read)
        window = min(self.looks_at, mean)
        base = mean - window
        least = base // self.number("beta")
        most = 2 * base - least
        if most > read - window:  # a layer cannot hold more than there is
            most = read - window
            least = 2 * base - most
        share = layer / max(1, layers - 1)
        even = round(most - share * (most - least)) if layers > 1 else base
        return max(1, window + even)


@dataclass(frozen=True)
class ChunkKv(SnapKv):
    """Holds whole chunks of ``size`` tokens: those whose entries are attended most together, over all heads.

    Of ``reuse`` layers each, the first one chooses for all. Scores are SnapKV's, pooled as in its published runs
    (``kernel=1``: not pooled).
    """

    name = "chunkkv"
    summary = "whole chunks of tokens that the last queries attend most"
    paper = "arXiv 2502.00299"
    shares_heads = True
    known = SnapKv.known | {"size": Option("10", least=1), "reuse": Option("1", least=1)}

    def follows(self, layer: int) -> int:
        return layer - layer % self.number("reuse")

    def scores(self, view: View) -> Tensor:
        size = self.number("size")
        worth = self._worth(view).mean(1)
        # Chunks are of the text, so that they stay what they are when others have gone.
        chunk = view.positions[:, 0] // size
        total = torch.zeros(*worth.shape[:1], int(chunk.max()) + 1, device=worth.device)
        count = torch.zeros_like(total).scatter_add_(1, chunk, torch.ones_like(worth))
        mean = total.scatter_add_(1, chunk, worth) / count.clamp(min=1)
        shared = mean.gather(1, chunk)[:, None].expand(view.keys.shape[:3])
        return protect_last(shared, self.looks_at)
