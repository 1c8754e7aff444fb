"""Search for the largest batch that fits: growing steps from a guess until the limit is bracketed, then bisection."""

from __future__ import annotations

from collections.abc import Callable

COARSE = 16
"""Bisection ends when the two bounds differ by at most one part in this many."""


def find_largest_batch(fits: Callable[[int], bool], guess: Callable[[], int] = lambda: 2, most: int = 1 << 16) -> int:
    """Find the largest batch that fits, to within one part in 16; 0 if not even one row does.

    Args:
        fits: called once per batch; assumed to be true up to some size and false above it.
        guess: the size to try first, called once after one row has been found to fit.
        most: largest size to try.
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
