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
    """Holds keys in ``bits`` bits per channel over groups of entries, and values per entry over groups of channels.

    The most recent entries stay as they are, at least ``residual`` of them; what is older is quantised in whole
    groups of ``group``, once. Departures: keys and values leave the residual together, where the published code lets
    values go one by one; where a head is no multiple of the group, its channels are one group. What is stored is
    unpacked for one layer and forward pass at a time. ``fit=bytes`` lets a ratio choose: the most bits with which
    the cache takes no more than that share of the full one, and the longest residual that then has place (at least
    the one that was given).
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
        """Without what is chosen text by text, unless it was given."""
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

    def fitted(self, n: int, shape: CacheShape) -> Self:
        odd = [width for width in sorted(shape.widths) if width % 4]
        if odd:
            raise UserError(f"kivi cannot pack heads of {odd[0]} numbers: codes of 2 bits fill bytes in fours.")
        if not self.by_bytes:
            return self
        if self.residual is None:
            return replace(self, residual=0).fitted(n, shape)
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
        """Entries held as they are that would take as many bytes."""
        count = self._quantised(n)
        return n - count + count * self._share(bits, shape)

    def _share(self, bits: int, shape: CacheShape) -> Fraction:
        """Of the bytes of an entry, what is left when it has been quantised."""
        group, taken = self.group, Fraction(0)
        for heads, keys, values in shape.layers:
            channels = group if values % group == 0 else values
            scales = Fraction(4 * keys, group) + Fraction(4 * values, channels)  # a least value and a step each
            taken += heads * (Fraction((keys + values) * bits, 8) + scales)
        return taken / shape.entry_bytes

    def _least_quantised(self, n: int, bits: int, shape: CacheShape, wanted: Fraction) -> int:
        """The fewest entries, in whole groups, with which the cache takes no more than is wanted."""
        group = self.group
        if wanted >= n:
            return 0
        return max(0, ceil((n - wanted) / (1 - self._share(bits, shape)) / group) * group)
