"""RefreshKV (arXiv 2411.05787): all entries stay; between steps with full attention, only a few are attended."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from kvbench.methods.base import Effect
from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, check_kernel, protect_last


@dataclass(frozen=True)
class RefreshKV(CachePolicy):
    """Attends to kept(n, r) entries and those since, chosen at every ``step``-th token, which attends to all entries.

    The choice is by the attention of that token, averaged over the query heads of each head and smoothed over
    ``kernel`` positions. Tokens after a context of P tokens always stay attended, and each choice among the context's
    entries takes kept(P, r) of them. It saves computation and no memory: all entries stay, and those attended are
    stored twice. The paper also refreshes when queries have changed; its thresholds are not public, and no code is.
    """

    name = "refreshkv"
    summary = "all entries; few are attended, chosen anew by a look at all: saves time, no memory"
    paper = "arXiv 2411.05787"
    version = 2
    budgets = ("ratio", "tokens")
    effect = Effect.ATTENDS_LESS

    window: int = field(default=1, kw_only=True)
    kernel: int = option(5, "places that attention is smoothed over", least=1)

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks)
        check_kernel(self.kernel)

    def run_length(self, read: int) -> int:
        return 1 if self.is_full_step(read) else self.step - read % self.step

    def is_due(self, read: int, since: int) -> bool:
        return self.is_full_step(read - 1)

    def is_full_step(self, read: int) -> bool:
        return read % self.step == 0

    def scores(self, view: LayerView) -> Tensor:
        kernel = self.kernel
        worth = view.mean_attention(1)
        smooth = functional.avg_pool1d(worth, kernel, stride=1, padding=kernel // 2)[..., : view.entries]
        return protect_last(smooth, 1)
