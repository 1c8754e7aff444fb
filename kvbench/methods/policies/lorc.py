"""LoRC (arXiv 2410.03111): keys and values of low rank, stored as coordinates."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from kvbench.cache.latents import Latents
from kvbench.cache.stored import StoredEntries
from kvbench.methods.base import Effect
from kvbench.methods.budget import kept
from kvbench.methods.options import option
from kvbench.methods.policies.low_rank import columns_of, low_rank, parts_of, ranks_by_layer
from kvbench.methods.policies.policy import CachePolicy, LayerView, Needs

LEAST = 0.5
"""Smallest share of the largest rank that a layer gets."""


@dataclass(frozen=True)
class LoRC(CachePolicy):
    """Computes keys and values with weights of low rank, and stores their coordinates: all heads of a layer together.

    Of the d numbers of a layer's keys, and as many of its values, kept(d, r) are stored on average over the layers; no
    token is removed. Keys and values are rebuilt whenever they are attended, and keys rotated to their positions. The
    last tokens, up to ``step``, are whole. The bases are weights of the model and are not counted as cache.

    All layers have the same rank (``ranks=uniform``). Published are higher ranks in the first layers, by the condition
    numbers of the weights of each and all later layers (``ranks=progressive``); the formula is recalled and not
    verified: shares fall linearly with the logarithm of their product, from the largest rank to half of it. On
    kvbench-tiny they predict worse than uniform ones. Version 1 stored entries in full and freed nothing.
    """

    name = "lorc"
    summary = "all entries, as coordinates of low-rank keys and values that are rebuilt when attended"
    paper = "arXiv 2410.03111"
    budgets = ("ratio",)
    effect = Effect.PACKS
    version = 2
    needs = Needs(rotations=True)

    ranks: str = option(
        "uniform", "whether all layers have one rank, or the first a higher one", choices=("uniform", "progressive"),
        later=True,
    )

    def by_layer(self, model: nn.Module) -> tuple[int, ...]:
        """The rank of keys and of values, by layer."""
        rank = max(1, kept(columns_of(model), self.ratio))
        return ranks_by_layer(model, rank, 1.0 if self.ranks == "uniform" else LEAST)

    def patched(self, model: nn.Module) -> AbstractContextManager[None]:
        return low_rank(model, self.by_layer(model))

    def pack(self, view: LayerView, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, int] | None:
        assert view.model is not None, "a session has one"
        rank = self.by_layer(view.model)[view.layer]
        if not view.entries or rank >= columns_of(view.model):
            return None
        of_keys, of_values = (part.cut(rank) for part in parts_of(view.model)[2 * view.layer : 2 * view.layer + 2])
        first = int(view.positions[0, 0, 0])
        return Latents.of(view.keys, view.values, (of_keys, of_values), first, view.inv_freq), view.entries
