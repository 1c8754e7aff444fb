"""RefreshKV (arXiv 2411.05787): everything stays, and little of it is attended between two looks at all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from kvbench.methods.base import Option
from kvbench.methods.policies.policy import Policy, View, check_kernel, protect_last


@dataclass(frozen=True)
class RefreshKv(Policy):
    """Attends kept(n, r) entries and those since, chosen by every ``step``-th token, which attends all of them.

    The choice is by the attention of that token, averaged over the query heads of each head and smoothed over
    ``kernel`` places. What follows a context of P tokens stays attended, and what is chosen anew meanwhile is
    kept(P, r) of the context's entries. It saves computation and no memory: all entries stay, and those attended are
    held twice. The paper also looks when queries have changed; its thresholds are not public, and no code is.
    """

    name = "refreshkv"
    summary = "all entries; few are attended, chosen anew by a look at all: saves time, no memory"
    paper = "arXiv 2411.05787"
    version = 2
    window = 1
    takes_budget = ("tokens",)
    keeps_all = True
    removes = False
    known = Policy.known | {"kernel": Option("5", least=1)}

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks)
        check_kernel(self)

    def run_length(self, read: int) -> int:
        step = self.number("step")
        return 1 if self.looks(read) else step - read % step

    def is_due(self, read: int, since: int) -> bool:
        return self.looks(read - 1)

    def looks(self, read: int) -> bool:
        return read % self.number("step") == 0

    def scores(self, view: View) -> Tensor:
        kernel = self.number("kernel")
        worth = view.attention(1)[:, :, :, 0].mean(2)
        smooth = functional.avg_pool1d(worth, kernel, stride=1, padding=kernel // 2)[..., : view.entries]
        return protect_last(smooth, 1)
