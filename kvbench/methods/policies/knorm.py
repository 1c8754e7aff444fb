"""Key norms (arXiv 2406.11430): keys with a small norm receive the most attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView


@dataclass(frozen=True)
class KNorm(CachePolicy):
    """Keeps the entries whose keys have the smallest L2 norm, separately in every head.

    ``skip=k`` leaves the first k layers uncompressed, so that the realised ratio is below the requested one; 0 by
    default.
    """

    name = "knorm"
    summary = "the entries with the smallest keys"
    paper = "arXiv 2406.11430"
    executions = ("streamed", "onepass")

    skip: int = option(0, "first layers that stay whole")

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        return read if layer < self.skip else self.held_after(read)

    def scores(self, view: LayerView) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(view.keys.float(), dim=-1)
        return -norms
