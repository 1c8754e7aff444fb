"""PyramidKV (Cai et al., arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.methods.options import option
from kvbench.methods.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a budget that falls linearly from the first layer to the last; the mean over layers is the budget.

    Apart from the window, the last layer gets 1 / ``beta`` of the mean, and the first layer as much more than the mean.
    Pooling is that of SnapKV, as in published runs.
    """

    name = "pyramidkv"
    summary = "as snapkv, with more entries in early layers and fewer in late ones"
    paper = "arXiv 2406.02069"

    beta: int = option(20, "how much less than the mean the last layer gets", least=1)

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        mean = self.held_after(read)
        window = min(self.window, mean)
        base = mean - window
        least = base // self.beta
        most = 2 * base - least
        if most > read - window:  # a layer cannot hold more than there is
            most = read - window
            least = 2 * base - most
        share = layer / max(1, layers - 1)
        even = round(most - share * (most - least)) if layers > 1 else base
        return max(1, window + even)
