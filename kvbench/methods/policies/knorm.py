"""Key norms (arXiv 2406.11430): entries with small keys are attended most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.base import Option
from kvbench.methods.policies.policy import Policy, View


@dataclass(frozen=True)
class Knorm(Policy):
    """Holds the entries whose keys have the least L2 norm, in every head by itself.

    ``skip=k`` leaves the first k layers whole, which makes the realised ratio less than the asked one; 0 by default.
    """

    name = "knorm"
    summary = "the entries with the smallest keys"
    paper = "arXiv 2406.11430"
    known = Policy.known | {"skip": Option("0")}

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        return read if layer < self.number("skip") else self.held_after(read)

    def scores(self, view: View) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(view.keys.float(), dim=-1)
        return -norms
