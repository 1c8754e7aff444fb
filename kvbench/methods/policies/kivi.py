"""Quantised caches: all entries in fewer bits, as in KIVI (arXiv 2402.02750) or in 8-bit floating point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

from kvbench.cache.quantized import Float8, Quantised
from kvbench.cache.shape import CacheShape
from kvbench.cache.stored import Packed
from kvbench.errors import UserError
from kvbench.methods.base import Option
from kvbench.methods.policies.policy import Policy, View

BITS = ("8", "4", "2")


@dataclass(frozen=True)
class Kivi(Policy):
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
    takes_ratio = False
    takes_budget = ("bytes",)
    packs = True
    known = Policy.known | {
        "bits": Option("4", BITS), "group": Option("32", least=4), "residual": Option("128"),
        "fit": Option("bits", ("bits", "bytes")),
    }

    @classmethod
    def uses_ratio(cls, options: Mapping[str, str], in_chunks: bool) -> bool:
        return options.get("fit") == "bytes"

    @property
    def by_bytes(self) -> bool:
        return self.option("fit") == "bytes" or bool(self.budget_bytes)

    @property
    def resolved(self) -> dict[str, str]:
        """Without what is chosen text by text, unless it was given."""
        chosen = {"bits", "residual"} - set(self.options) if self.by_bytes else ()
        return {name: value for name, value in super().resolved.items() if name not in chosen}

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks)
        if self.number("group") % 4:
            raise UserError(f"--set group={self.option('group')}: codes of 2 bits fill bytes in fours.",
                            "Give a multiple of 4.")

    def packed(self, view: View, earlier: tuple[Packed, ...]) -> tuple[Packed, int] | None:
        count = self._quantised(view.entries)
        if count == 0:
            return None
        keys, values = view.keys[:, :, :count], view.values[:, :, :count]
        return Quantised.of(keys, values, int(self.option("bits")), self.number("group")), count

    def _quantised(self, plain: int) -> int:
        group = self.number("group")
        return max(0, plain - self.number("residual")) // group * group

    def fitted(self, n: int, shape: CacheShape) -> Kivi:
        odd = [width for width in sorted(shape.widths) if width % 4]
        if odd:
            raise UserError(f"kivi cannot pack heads of {odd[0]} numbers: codes of 2 bits fill bytes in fours.")
        if not self.by_bytes:
            return self
        if "residual" not in self.options:
            return replace(self, options={**self.options, "residual": "0"}).fitted(n, shape)
        asked = self.ratio_of_bytes(n, shape)
        wanted = (1 - asked) * n
        shares = {}
        for bits in BITS if "bits" not in self.options else (self.option("bits"),):
            shares[bits] = self._entries(n, int(bits), shape)
            if shares[bits] <= wanted and (wanted >= n or self._share(int(bits), shape) < 1):
                residual = str(n - self._least_quantised(n, int(bits), shape, wanted))
                return replace(self, options={**self.options, "bits": bits, "residual": residual})
        least = 1 - min(shares.values()) / n
        raise UserError(
            f"kivi cannot remove {float(asked):.3g} of the bytes of {n} entries: with "
            f"{min(shares, key=int)} bits, scales and "
            f"{n - self._quantised(n)} entries as they are it removes {float(least):.2f}.",
            "Ask for less, or leave out --set residual= and bits=.",
        )

    def _entries(self, n: int, bits: int, shape: CacheShape) -> Fraction:
        """Entries held as they are that would take as many bytes."""
        count = self._quantised(n)
        return n - count + count * self._share(bits, shape)

    def _share(self, bits: int, shape: CacheShape) -> Fraction:
        """Of the bytes of an entry, what is left when it has been quantised."""
        group, taken = self.number("group"), Fraction(0)
        for heads, keys, values in shape.layers:
            channels = group if values % group == 0 else values
            scales = Fraction(4 * keys, group) + Fraction(4 * values, channels)  # a least value and a step each
            taken += heads * (Fraction((keys + values) * bits, 8) + scales)
        return taken / shape.entry_bytes

    def _least_quantised(self, n: int, bits: int, shape: CacheShape, wanted: Fraction) -> int:
        """The fewest entries, in whole groups, with which the cache takes no more than is wanted."""
        group = self.number("group")
        if wanted >= n:
            return 0
        return max(0, ceil((n - wanted) / (1 - self._share(bits, shape)) / group) * group)


@dataclass(frozen=True)
class Fp8(Policy):
    """Holds all entries in 8-bit floating point (e4m3), with a scale per row and head that the first of them set.

    As the fp8 cache of transformers, which has one scale for a whole tensor.
    """

    name = "fp8"
    summary = "all entries in 8-bit floating point"
    takes_ratio = False
    takes_budget = ()
    packs = True

    def packed(self, view: View, earlier: tuple[Packed, ...]) -> tuple[Packed, int] | None:
        if view.entries == 0:
            return None
        scales = earlier[-1].scales if earlier and isinstance(earlier[-1], Float8) else None
        return Float8.of(view.keys, view.values, scales), view.entries
