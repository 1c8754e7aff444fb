"""The largest batch that fits: doubled or halved from a guess until both sides are known, then bisected."""

from __future__ import annotations

from collections.abc import Callable

COARSE = 16
"""Bisection ends when the two ends are less than one in so many apart."""


def largest(fits: Callable[[int], bool], guess: Callable[[], int] = lambda: 2, most: int = 1 << 16) -> int:
    """The largest batch that fits, to one in 16; 0 if not even one row does.

    Args:
        fits: asked once per batch; assumed to be true up to some size and false from there on.
        guess: where to look first, asked once one row is known to fit.
        most: never asked about more.
    """
    if not fits(1):
        return 0
    low, high, step = 1, most + 1, 0
    place = min(max(2, guess()), most)
    while low < place < high:
        if fits(place):
            low, step = place, max(1, place // 8) if step <= 0 else 2 * step
            place = low + step
        else:
            high, step = place, -max(1, place // 8) if step >= 0 else 2 * step
            place = high + step
    while high - low > max(1, low // COARSE):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
