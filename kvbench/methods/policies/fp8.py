"""A cache in 8-bit floating point."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.cache.quantized import Float8
from kvbench.cache.stored import StoredEntries
from kvbench.methods.base import Effect
from kvbench.methods.policies.policy import CachePolicy, LayerView


@dataclass(frozen=True)
class FP8(CachePolicy):
    """Stores all entries in 8-bit floating point (e4m3), with one scale per row and head, set by the first entries.

    Similar to the fp8 cache of transformers, which has one scale for a whole tensor.
    """

    name = "fp8"
    summary = "all entries in 8-bit floating point"
    budgets = ()
    effect = Effect.PACKS

    def pack(self, view: LayerView, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, int] | None:
        if view.entries == 0:
            return None
        scales = earlier[-1].scales if earlier and isinstance(earlier[-1], Float8) else None
        return Float8.of(view.keys, view.values, scales), view.entries
