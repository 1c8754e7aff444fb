"""Diversity of the texts as a set: distinct / all bigrams of words, with as many words from every text.

The value falls with the size of the set, hence the fixed number of words. It is not a function of sums over documents,
and resampling with replacement would duplicate bigrams, so its interval is that of the jackknife, which leaves out one
group at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbench.metrics.base import MEANING, Shown
from kvbench.metrics.texts import words

ORDER = 2
SHOWN = Shown("distinct", 3, None, (MEANING,))


class Jackknifed(NamedTuple):
    """A value, and the values with one group left out, ``[groups]``."""

    value: float
    without: NDArray[np.float64]


def budget(new_tokens: int) -> int:
    """Number of words that are used of every text: half of ``new_tokens``."""
    return max(ORDER, new_tokens // 2)


def signature(new_tokens: int) -> str:
    """The settings that define what the number means."""
    return f"distinct/all {ORDER}-grams of words|first {budget(new_tokens)} words of first draws|jackknife|v:1"


def distinct(groups: Sequence[Sequence[str]], limit: int) -> Jackknifed:
    """The value for groups of texts, using the first ``limit`` words of each text."""
    counts = []
    for texts in groups:
        counted: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            found = words(text)[:limit]
            counted.update(zip(*(found[i:] for i in range(ORDER)), strict=False))
        counts.append(counted)
    holders = Counter(gram for counted in counts for gram in counted)
    total, kinds = sum(sum(c.values()) for c in counts), len(holders)
    without = [
        (kinds - sum(1 for gram in counted if holders[gram] == 1)) / max(1, total - sum(counted.values()))
        for counted in counts
    ]
    return Jackknifed(kinds / max(1, total), np.asarray(without))


def interval(found: Jackknifed) -> tuple[float, float, float]:
    """Bounds of the 95 % interval, and the standard error; NaN for fewer than two groups."""
    from scipy import stats  # takes half a second, which most reports need not pay

    n = len(found.without)
    if n < 2:
        return float("nan"), float("nan"), float("nan")
    error = float(np.sqrt((n - 1) / n * np.sum((found.without - found.without.mean()) ** 2)))
    half = float(stats.norm.ppf(0.975)) * error
    return found.value - half, found.value + half, error


def difference(method: Jackknifed, full: Jackknifed) -> Jackknifed:
    """The difference between two sets of texts with the same groups in the same order."""
    return Jackknifed(method.value - full.value, method.without - full.without)


def p_value(found: Jackknifed) -> float | None:
    """Two-sided p-value for a difference of 0, by the jackknife's standard error; None if that is not finite."""
    from scipy import stats  # takes half a second, which most reports need not pay

    error = interval(found)[2]
    if not np.isfinite(error):
        return None
    return 1.0 if error == 0 else float(2 * stats.norm.sf(abs(found.value) / error))
