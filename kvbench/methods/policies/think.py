"""ThinK (arXiv 2407.21018): removes the channels of keys that queries use least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Self

from kvbench.cache.pruned_channels import PrunedChannels
from kvbench.cache.shape import CacheShape
from kvbench.cache.stored import StoredEntries
from kvbench.errors import UserError
from kvbench.methods.base import Effect
from kvbench.methods.budget import ratio_text
from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, highest


@dataclass(frozen=True)
class ThinK(CachePolicy):
    """Removes the key channels with the least energy in the last queries and the keys, separately in each head.

    The ratio is that of the bytes of the whole cache, so that 0.25 removes about half of the channels of the keys. The
    last ``recent`` entries stay whole; for older ones, the energy of a channel is its mean square over the last
    ``window`` queries of all query heads of the head, times its mean square over the keys. Entries lose channels once,
    as they leave the recent ones, at least ``group`` of them together. ``channels`` is the number of channels that each
    key keeps; 0, the default, derives it from the ratio, for the whole text with its recent entries. Removed channels
    are freed; kvpress sets them to zero.
    """

    name = "think"
    summary = "all entries, without the channels of keys that queries use least"
    paper = "arXiv 2407.21018"
    budgets = ("ratio", "bytes")
    effect = Effect.PACKS

    window: int = option(32, "last queries that channels are weighed by", least=1)
    recent: int = option(32, "most recent entries that stay whole")
    group: int = option(32, "least entries that lose channels together", least=1)
    channels: int = option(0, "channels that each key keeps; 0: as the ratio says")

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks)
        if self.ratio >= Fraction(1, 2):
            raise UserError(
                f"think cannot remove {ratio_text(self.ratio)} of the cache: keys are half of it.",
                "Give a --ratio below 0.5.",
            )

    @property
    def rule_version(self) -> int:
        """2 with a budget in bytes, which version 1 could exceed; 1 otherwise, where nothing has changed."""
        return 2 if self.budget_bytes else 1

    def pack(self, view: LayerView, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, int] | None:
        count, width = view.entries - self.recent, view.keys.shape[-1]
        left = self.channels or self._left(view.read, width)
        if count < self.group or left >= width:
            return None
        assert view.queries is not None, "it looks at queries"
        keys, values = (t[:, :, :count] for t in (view.keys, view.values))
        batch, heads = keys.shape[:2]
        used = view.queries.float().square().mean(2).reshape(batch, heads, -1, width).mean(2)
        energy = used * keys.float().square().mean(2)
        return PrunedChannels.of(keys, values, highest(energy, left)), count

    def with_budget_for(self, n: int, shape: CacheShape) -> Self:
        if len(shape.widths) > 1:
            raise UserError(
                "think takes keys to be half of the cache, and this model's keys and values have "
                f"{' and '.join(map(str, sorted(shape.widths)))} numbers.", "Use another method.",
            )
        asked, old = replace(self, ratio=self.ratio_of_bytes(n, shape), budget_bytes=0), n - self.recent
        one = Fraction(old, min(shape.widths)) if self.budget_bytes else 0  # one channel has to stay
        if not self.channels and (asked.ratio * n * 2 >= max(0, old) or asked.ratio * n * 2 > old - one):
            raise UserError(
                f"think cannot remove {float(asked.ratio):.3g} of the bytes of {n} entries: "
                f"{self.recent} of them stay whole, and keys are half of the others.",
                "Ask for less, or use a smaller --set recent=.",
            )
        given = self.channels or asked._left(n, min(shape.widths), at_most=self.budget_bytes > 0)
        return replace(asked, channels=given)

    def _left(self, n: int, width: int, at_most: bool = False) -> int:
        """Channels that the keys of older entries keep: as close to the ratio of the whole cache's bytes as possible,
        or, if ``at_most``, without exceeding the bytes that it leaves."""
        old = n - self.recent
        if old <= 0:
            return width
        exact = 2 * width * self.ratio * n / old
        return max(1, width - (ceil(exact) if at_most else round(exact)))
