"""Random eviction: the control of every policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.policy import Policy, View

_MIX = 0x9E3779B97F4A7C15 - (1 << 64)
_MORE = 0xBF58476D1CE4E5B9 - (1 << 64)


@dataclass(frozen=True)
class Random(Policy):
    """Every entry draws a number when it is computed, and those with the highest stay.

    The number is a hash of seed, text, layer, head and place, so that it depends on nothing else, and an entry that
    has been removed could not have come back.
    """

    name = "random"
    summary = "entries that drew the highest numbers: the control of every policy"

    def scores(self, view: View) -> Tensor:
        return drawn(view)


def drawn(view: View) -> Tensor:
    """float32 ``[batch, heads, entries]`` in [0, 1): a number of each entry, the same whenever it is asked for."""
    heads = torch.arange(view.keys.shape[1], device=view.keys.device)
    state = _hashed(view.lots[:, None, None] * 1009 + view.seed)
    state = _hashed(state + (view.layer * 1024 + heads)[None, :, None])
    bits = _hashed(state + view.positions) >> 40
    return (bits & 0xFFFFFF).float() / (1 << 24)  # 24 bits, which float32 holds exactly


def _hashed(x: Tensor) -> Tensor:
    """A mixing of 64 bits (splitmix64), with shifts that keep the sign: good enough to draw by."""
    x = x * _MIX
    x = (x ^ (x >> 30)) * _MORE
    return x ^ (x >> 27)
