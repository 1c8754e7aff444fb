"""Diversity of the texts as a set: distinct / all bigrams of words, with as many words from every text.

The value falls with the size of the set, hence the fixed number of words. It is not a function of sums over documents,
and resampling with replacement would duplicate bigrams, so its interval is that of the jackknife, which leaves out one
group at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbench.metrics.base import MEANING, Shown
from kvbench.metrics.texts import words

ORDER = 2
SHOWN = Shown("distinct", 3, None, (MEANING,))


Array = NDArray[np.float64]


class Jackknifed(NamedTuple):
    """A value, and the values with one group left out, ``[groups]``."""

    value: float
    without: Array


def budget(new_tokens: int) -> int:
    """Number of words that are used of every text: half of ``new_tokens``."""
    return max(ORDER, new_tokens // 2)


def signature(new_tokens: int) -> str:
    """The settings that define what the number means."""
    return f"distinct/all {ORDER}-grams of words|first {budget(new_tokens)} words of first draws|jackknife|v:1"


def counts(texts: Sequence[tuple[str, str]], limit: int) -> Array:
    """Count the bigrams of texts, using the first ``limit`` words of each.

    A bigram that several texts have counts as found in the first of them.

    Args:
        texts: pairs of a group and a text.

    Returns:
        ``[texts, 3]``: all bigrams; different ones that no other group has; different ones that another group has, too.
    """
    found = []
    groups: dict[tuple[str, ...], set[str]] = {}
    for group, text in texts:
        first = words(text)[:limit]
        grams = list(zip(*(first[i:] for i in range(ORDER)), strict=False))
        found.append((len(grams), [gram for gram in dict.fromkeys(grams) if gram not in groups]))
        for gram in grams:
            groups.setdefault(gram, set()).add(group)
    counted = [
        (total, own := sum(len(groups[gram]) == 1 for gram in new), len(new) - own) for total, new in found
    ]
    return np.asarray(counted, dtype=np.float64).reshape(-1, 3)


def distinct(sums: Array) -> Jackknifed:
    """The value from the counts of texts, summed by group, ``[groups, 3]``."""
    total, kinds = sums[:, 0].sum(), sums[:, 1:].sum()
    without = (kinds - sums[:, 1]) / np.maximum(1, total - sums[:, 0])
    return Jackknifed(float(kinds / max(1, total)), without)


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
