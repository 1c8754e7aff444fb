"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, check_kernel, check_room, protect_last

POOLS: dict[str, Callable[..., Tensor]] = {"mean": functional.avg_pool1d, "max": functional.max_pool1d}


@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """Keeps the last ``window`` entries and those that their queries attend to most, pooled over ``kernel`` positions.

    Attention is averaged over the queries of the window and the query heads of each key-value head, so that one set of
    entries is stored per key-value head. The published code stores a set per query head, which takes more memory.
    Published runs take the maximum over 7 positions, as here; the class in that code defaults to the mean over 5
    (``pool=mean``, ``kernel=5``).
    """

    name = "snapkv"
    summary = "the last entries, and those that their queries attend most"
    paper = "arXiv 2404.14469"

    window: int = option(32, "last queries that choose, whose entries stay", least=1)
    kernel: int = option(7, "places that attention is smoothed over", least=1)
    pool: str = option("max", "how it is smoothed", choices=tuple(POOLS))

    @property
    def minimum(self) -> int:
        return self.window + 1

    def check_kept(self, n: int) -> None:
        """Check that more than the window is kept; otherwise the method would be a plain window, whatever its name."""
        check_room(self, n, "window", "it would be a plain window")

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks)
        check_kernel(self.kernel)

    def scores(self, view: LayerView) -> Tensor:
        return protect_last(self._worth(view), self.window)

    def _worth(self, view: LayerView) -> Tensor:
        """``[batch, heads, entries]``: smoothed attention to the entries before the window; 0 within it."""
        before = max(0, view.entries - self.window)
        worth = view.mean_attention(self.window)[..., :before]
        kernel, pool = self.kernel, POOLS[self.pool]
        if before:
            worth = pool(worth, kernel, stride=1, padding=kernel // 2)[..., :before]
        return functional.pad(worth, (0, view.entries - before))
