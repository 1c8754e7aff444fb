"""LagKV (arXiv 2504.04704): entries that stand out against the window after theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView


@dataclass(frozen=True)
class LagKV(CachePolicy):
    """Splits the entries after the ``sinks`` into windows of ``lag``; each window is scored against the next one.

    Keys and values are min-max scaled per channel, by the minimum and maximum of the next window; an entry's score is
    the standard deviation over its channels, softmaxed over its window, keys and values added. Scores are replaced by
    ranks within the window, so that each window keeps equally many entries. The sinks, the last whole window and the
    entries after it are removed last. Departures: one choice over all windows at every removal, where the published
    code processes each window once; channels that are constant in the next window count as zero.
    """

    name = "lagkv"
    summary = "the entries that stand out against the next window of keys and values"
    paper = "arXiv 2504.04704"

    sinks: int = option(4, "first entries that stay")
    lag: int = option(32, "entries of a window", least=2)

    def scores(self, view: LayerView) -> Tensor:
        sinks, lag, n = self.sinks, self.lag, view.entries
        windows = max(0, n - sinks) // lag
        recent = torch.arange(n, device=view.keys.device).float()
        scores = (2 + recent).expand(view.keys.shape[:3]).clone()  # above all ranks; later entries score higher
        scores[..., :sinks] = float("inf")
        if windows < 2:
            return scores
        stop = sinks + windows * lag
        parts = [
            tensor[:, :, sinks:stop].float().reshape(*tensor.shape[:2], windows, lag, -1)
            for tensor in (view.keys, view.values)
        ]
        worth = sum((_deviation(part) for part in parts), torch.zeros((), device=recent.device))
        ranks = worth.argsort(-1).argsort(-1).float() / lag
        scores[:, :, sinks : stop - lag] = ranks.flatten(2)
        return scores


def _deviation(windows: Tensor) -> Tensor:
    """Scores ``[batch, heads, windows - 1, lag]`` of windows ``[batch, heads, windows, lag, width]``."""
    least, most = windows[:, :, 1:].amin(-2, keepdim=True), windows[:, :, 1:].amax(-2, keepdim=True)
    span = most - least
    scaled = torch.where(span > 0, (windows[:, :, :-1] - least) / span, torch.zeros_like(windows[:, :, :-1]))
    return scaled.std(-1).softmax(-1)
