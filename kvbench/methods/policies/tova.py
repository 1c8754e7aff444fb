"""TOVA (arXiv 2401.06104): what the last query attends."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvbench.methods.policies.policy import Policy, View


@dataclass(frozen=True)
class Tova(Policy):
    """Holds the entries that the last query attends most, averaged over all heads: the same set for all of them.

    No sinks and no window are protected; the newest entry stays by its own weight, or does not.
    """

    name = "tova"
    summary = "the entries that the last query attends most, over all heads"
    paper = "arXiv 2401.06104"
    window = 1
    shares_heads = True

    def scores(self, view: View) -> Tensor:
        return view.attention(1)[:, :, :, 0].mean(2)
