"""Random eviction: the control for every policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, protect_first

_STEP, _MIX, _MORE = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Random(CachePolicy):
    """Keeps the first ``sinks`` entries and a random choice of the others.

    Sinks are kept since models may rely on them: a choice without them would be no fair control for policies that keep
    them; ``sinks=0`` chooses among all entries. Every entry has a fixed random number, and the highest are kept. The
    number is a hash of seed, text, layer, head and position and depends on nothing else, so that a removed entry would
    not have been chosen later.
    """

    name = "random"
    summary = "the 4 first entries, and those that drew the highest numbers: the control of every policy"

    sinks: int = option(4, "first entries that stay")

    def scores(self, view: LayerView) -> Tensor:
        return protect_first(random_numbers(view), view.positions, self.sinks)


def random_numbers(view: LayerView) -> Tensor:
    """float32 ``[batch, heads, entries]`` in [0, 1): a random number for each entry, the same at every call."""
    heads = torch.arange(view.keys.shape[1], device=view.keys.device)
    state = _hashed(view.row_seeds[:, None, None] * 1009 + view.seed)
    state = _hashed(state + (view.layer * 1024 + heads)[None, :, None])
    return _shifted(_hashed(state + view.positions), 40).float() / (1 << 24)  # 24 bits, which float32 holds exactly


def _hashed(x: Tensor) -> Tensor:
    """Output of splitmix64 for the state ``x``; int64 stands for 64 unsigned bits."""
    x = x + _STEP
    x = (x ^ _shifted(x, 30)) * _MIX
    x = (x ^ _shifted(x, 27)) * _MORE
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, count: int) -> Tensor:
    """Logical right shift, which fills with zeros; on int64, ``>>`` fills with the sign bit."""
    return (x >> count) & ((1 << (64 - count)) - 1)
