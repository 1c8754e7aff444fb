"""Key norms (arXiv 2406.11430): entries with small keys are attended most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView


@dataclass(frozen=True)
class KNorm(CachePolicy):
    """Holds the entries whose keys have the least L2 norm, in every head by itself.

    ``skip=k`` leaves the first k layers whole, which makes the realised ratio less than the asked one; 0 by default.
    """

    name = "knorm"
    summary = "the entries with the smallest keys"
    paper = "arXiv 2406.11430"

    skip: int = option(0, "first layers that stay whole")

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        return read if layer < self.skip else self.held_after(read)

    def scores(self, view: LayerView) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(view.keys.float(), dim=-1)
        return -norms
