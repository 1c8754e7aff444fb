"""The largest batch that fits: doubled until one does not, then bisected."""

from __future__ import annotations

from collections.abc import Callable

COARSE = 16
"""Bisection ends when the two ends are less than one in so many apart."""


def largest(fits: Callable[[int], bool], most: int = 1 << 16) -> int:
    """The largest batch that fits, to one in 16; 0 if not even one row does.

    Args:
        fits: asked once per batch; assumed to be true up to some size and false from there on.
        most: never asked about more.
    """
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(1, low // COARSE):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
