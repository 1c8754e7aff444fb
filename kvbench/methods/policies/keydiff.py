"""KeyDiff (arXiv 2504.15364): entries whose keys differ from the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from kvbench.methods.policies.policy import CachePolicy, LayerView


@dataclass(frozen=True)
class KeyDiff(CachePolicy):
    """Keeps the entries whose keys have the lowest cosine similarity to the mean of all normalised keys of their head.

    ``prefill=blocks`` removes entries after every ``step`` tokens of a prefix, which is what the method was designed
    for; by default a prefix is compressed once, as under every other policy.
    """

    name = "keydiff"
    summary = "the entries whose keys are least like the mean key"
    paper = "arXiv 2504.15364"
    executions = ("streamed", "onepass")

    def scores(self, view: LayerView) -> Tensor:
        keys = view.keys.float()
        anchor = functional.normalize(keys, dim=-1).mean(-2, keepdim=True)
        return -functional.cosine_similarity(keys, anchor, dim=-1)
