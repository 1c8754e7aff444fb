"""Timing in pairs: ours and the rival in turn, so that a drifting machine moves both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(
    name: str, ours: Callable[[], object], rival: Callable[[], object], target: float, repeats: int = 15,
    scale: float = 1.0,
) -> float:
    """Speed of ours as a multiple of the rival's: the median of paired ratios, printed with its range.

    Args:
        target: the least multiple wanted.
        scale: work that one call of ours does, in calls of the rival.
    """
    return compare_times(
        name, lambda: seconds(ours), lambda: seconds(rival), target, repeats=repeats, scale=scale
    )


def compare_times(
    name: str, ours: Callable[[], float], rival: Callable[[], float], target: float, repeats: int = 15,
    scale: float = 1.0,
) -> float:
    """The same for work that takes its own time: both return seconds."""
    for warm in (ours, rival, ours, rival):
        warm()
    ratios = []
    for turn in range(repeats):
        first, second = (ours, rival) if turn % 2 == 0 else (rival, ours)
        a, b = first(), second()
        mine, theirs = (a, b) if turn % 2 == 0 else (b, a)
        ratios.append(scale * theirs / mine)
    median = statistics.median(ratios)
    verdict = "ok" if median >= target else "MISSED"
    print(
        f"{name:62s} {median:8.2f} x  [{min(ratios):.2f}, {max(ratios):.2f}]  target {target:g} x  {verdict}",
        flush=True,
    )
    return median
