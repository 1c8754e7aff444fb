"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Self

from kvbench.cache.quantized import Quantised
from kvbench.cache.shape import CacheShape
from kvbench.cache.stored import StoredEntries
from kvbench.errors import UserError
from kvbench.methods.base import Effect
from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView

BITS = (8, 4, 2)
USUAL_BITS, USUAL_RESIDUAL = 4, 128


@dataclass(frozen=True)
class KIVI(CachePolicy):
    """Quantises keys to ``bits`` bits per channel over groups of entries, values per entry over groups of channels.

    The most recent entries, at least ``residual`` of them, are not quantised; older ones are, once, in whole groups of
    ``group``. Departures: keys and values leave the residual together, where the published code quantises values one by
    one; if the head dimension is not a multiple of the group, its channels are one group. Stored entries are
    dequantised for one layer and forward pass at a time. With ``fit=bytes`` the ratio decides: the most bits with which
    the cache takes no more than the bytes that the ratio leaves, and the longest residual that then fits (at least the
    given one).
    """

    name = "kivi"
    summary = "all entries, in 8, 4 or 2 bits, but for the most recent"
    paper = "arXiv 2402.02750"
    budgets = ("bytes",)
    effect = Effect.PACKS

    bits: int | None = option(None, "of a code", choices=BITS, usual=USUAL_BITS)
    group: int = option(32, "entries, or channels, that share a scale", least=4)
    residual: int | None = option(None, "most recent entries that stay as they are", usual=USUAL_RESIDUAL)
    fit: str = option("bits", "what chooses bits and residual: the options, or the ratio", choices=("bits", "bytes"))

    def uses_ratio(self, in_chunks: bool) -> bool:
        return self.fit == "bytes"

    @property
    def by_bytes(self) -> bool:
        return self.fit == "bytes" or bool(self.budget_bytes)

    @property
    def resolved(self) -> dict[str, str]:
        """Options in effect; ``bits`` and ``residual`` are left out where they are chosen for each text."""
        chosen = {name for name in ("bits", "residual") if self.by_bytes and getattr(self, name) is None}
        return {name: value for name, value in super().resolved.items() if name not in chosen}

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks)
        if self.group % 4:
            raise UserError(f"--set group={self.group}: codes of 2 bits fill bytes in fours.",
                            "Give a multiple of 4.")

    def pack(self, view: LayerView, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, int] | None:
        count = self._quantised(view.entries)
        if count == 0:
            return None
        keys, values = view.keys[:, :, :count], view.values[:, :, :count]
        return Quantised.of(keys, values, self.bits or USUAL_BITS, self.group), count

    def _quantised(self, plain: int) -> int:
        residual = USUAL_RESIDUAL if self.residual is None else self.residual
        return max(0, plain - residual) // self.group * self.group

    def with_budget_for(self, n: int, shape: CacheShape) -> Self:
        odd = [width for width in sorted(shape.widths) if width % 4]
        if odd:
            raise UserError(f"kivi cannot pack heads of {odd[0]} numbers: codes of 2 bits fill bytes in fours.")
        if not self.by_bytes:
            return self
        if self.residual is None:
            return replace(self, residual=0).with_budget_for(n, shape)
        asked = self.ratio_of_bytes(n, shape)
        wanted = (1 - asked) * n
        shares = {}
        for bits in BITS if self.bits is None else (self.bits,):
            shares[bits] = self._entries(n, bits, shape)
            if shares[bits] <= wanted and (wanted >= n or self._share(bits, shape) < 1):
                return replace(self, bits=bits, residual=n - self._least_quantised(n, bits, shape, wanted))
        least = 1 - min(shares.values()) / n
        raise UserError(
            f"kivi cannot remove {float(asked):.3g} of the bytes of {n} entries: with "
            f"{min(shares)} bits, scales and "
            f"{n - self._quantised(n)} entries as they are it removes {float(least):.2f}.",
            "Ask for less, or leave out --set residual= and bits=.",
        )

    def _entries(self, n: int, bits: int, shape: CacheShape) -> Fraction:
        """Number of unquantised entries that take as many bytes as the cache after ``n`` tokens."""
        count = self._quantised(n)
        return n - count + count * self._share(bits, shape)

    def _share(self, bits: int, shape: CacheShape) -> Fraction:
        """Bytes of a quantised entry as a fraction of those of an unquantised one."""
        group, taken = self.group, Fraction(0)
        for heads, keys, values in shape.layers:
            channels = group if values % group == 0 else values
            scales = Fraction(4 * keys, group) + Fraction(4 * values, channels)  # a minimum and a step per group
            taken += heads * (Fraction((keys + values) * bits, 8) + scales)
        return taken / shape.entry_bytes

    def _least_quantised(self, n: int, bits: int, shape: CacheShape, wanted: Fraction) -> int:
        """Fewest entries to quantise, in whole groups, for a cache of at most the bytes of ``wanted`` entries."""
        group = self.group
        if wanted >= n:
            return 0
        return max(0, ceil((n - wanted) / (1 - self._share(bits, shape)) / group) * group)
