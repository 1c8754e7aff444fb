"""Exact compression ratios, and the number of entries that they keep."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

from kvbench.errors import UserError


def parse_ratio(text: str | float) -> Fraction:
    """Parse a ratio, the fraction of entries to remove, as an exact decimal in [0, 1).

    Raises:
        UserError: not a number, or outside the interval.
    """
    try:
        ratio = Fraction(Decimal(str(text)))
    except (ArithmeticError, ValueError):
        raise UserError(
            f"--ratio {text!s} is not a number.", "Give the share to remove, such as 0.7."
        ) from None
    if not 0 <= ratio < 1:
        raise UserError(
            f"--ratio {text!s} is outside [0, 1).",
            "It is the share of cache entries that is removed: 0.7 keeps 30 %.",
        )
    return ratio


def ratio_text(ratio: Fraction) -> str:
    """The ratio as its shortest exact decimal, such as ``0.7``."""
    exact = Decimal(ratio.numerator) / Decimal(ratio.denominator)
    return f"{exact.normalize():f}"


def kept(n: int, ratio: Fraction, min_keep: int = 1) -> int:
    """Number of entries kept of ``n`` text tokens: ``max(min_keep, n - floor(ratio * n))``, in exact arithmetic."""
    return max(min_keep, n - (ratio.numerator * n) // ratio.denominator)
