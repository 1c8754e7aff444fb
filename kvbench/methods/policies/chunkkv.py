"""ChunkKV (Liu et al., arXiv 2502.00299)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import LayerView, protect_last
from kvbench.methods.policies.snapkv import SnapKV


@dataclass(frozen=True)
class ChunkKV(SnapKV):
    """Keeps whole chunks of ``size`` tokens: those with the highest mean score over their entries and all heads.

    The first of every ``reuse`` layers chooses for all of them. Scores are SnapKV's, pooled as in its published runs
    (``kernel=1``: not pooled).
    """

    name = "chunkkv"
    summary = "whole chunks of tokens that the last queries attend most"
    paper = "arXiv 2502.00299"
    shares_heads = True

    size: int = option(10, "tokens of a chunk", least=1)
    reuse: int = option(1, "layers that share a choice", least=1)

    def follows(self, layer: int) -> int:
        return layer - layer % self.reuse

    def scores(self, view: LayerView) -> Tensor:
        size = self.size
        worth = self._worth(view).mean(1)
        # Chunks are counted in text positions, so that removing entries does not shift them.
        chunk = view.positions[:, 0] // size
        total = torch.zeros(*worth.shape[:1], int(chunk.max()) + 1, device=worth.device)
        count = torch.zeros_like(total).scatter_add_(1, chunk, torch.ones_like(worth))
        mean = total.scatter_add_(1, chunk, worth) / count.clamp(min=1)
        shared = mean.gather(1, chunk)[:, None].expand(view.keys.shape[:3])
        return protect_last(shared, self.window)
