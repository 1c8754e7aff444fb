"""Intervals, paired tests and Holm's correction. The unit of resampling is the group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 5000
LEVEL = 0.95
EXCHANGES = 9999
MOST_FLIPS, FLIPS_BYTES = 199_999, 1 << 28

SIGNIFICANT = 0.05
"""The p-value below which a difference is called one."""


class GroupSums:
    """Sums per group, ``[groups, columns]``, whose resampled totals are computed once for each seed."""

    def __init__(self, sums: Array) -> None:
        self.sums = sums
        self._totals: dict[int, Array] = {}

    def totals(self, seed: int, weights: Array) -> Array:
        """``[resamples, columns]``."""
        if seed not in self._totals:
            used = self.sums.any(0)  # most bins of a histogram are empty
            totals = np.zeros((len(weights), self.sums.shape[1]))
            totals[:, used] = weights @ self.sums[:, used]
            self._totals[seed] = totals
        return self._totals[seed]


@lru_cache(maxsize=1)
def _weights(groups: int, seed: int) -> Array:
    """How often each resample holds each group: ``[resamples, groups]``. Cells of a run share their groups and
    their seed, and with them this."""
    drawn = np.random.default_rng(seed).integers(0, groups, (RESAMPLES, groups))
    rows = np.arange(RESAMPLES)[:, None] * groups
    return np.bincount((drawn + rows).ravel(), minlength=RESAMPLES * groups).reshape(RESAMPLES, groups).astype(float)


def bootstrap_intervals(
    tables: Sequence[GroupSums], values: Callable[[Sequence[Array]], Array], seed: int
) -> Array:
    """Percentile intervals of many statistics from one and the same resampling of groups.

    Args:
        tables: all with the same groups in order.
        values: from resampled totals, each ``[resamples, columns]``, to ``[statistics, resamples]``.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        ``[statistics, 2]``, low and high ends; NaN where there are fewer than two groups.
    """
    groups = tables[0].sums.shape[0]
    if groups < 2:
        size = values([table.sums.sum(0)[None] for table in tables]).shape[0]
        return np.full((size, 2), np.nan)

    # What scipy.stats.bootstrap does with method="percentile", to the last digit, but that it would draw anew for
    # every cell: a report of 10,000 records took twice as long.
    weights = _weights(groups, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = values([table.totals(seed, weights) for table in tables])
    tail = (1 - LEVEL) / 2
    interval: Array = np.percentile(found, [100 * tail, 100 * (1 - tail)], axis=-1)
    return interval.T


def paired_p_value(differences: Array, seed: int) -> float | None:
    """Two-sided sign-flip permutation test that the differences of the groups centre on zero.

    Exact when there are few groups; otherwise ``(c + 1) / (n + 1)`` over up to 199,999 random flips, which are the
    same for all differences of as many groups, so that they need be drawn once. A grid makes many comparisons, and
    with fewer flips none of them could survive the correction for it.
    """
    groups = len(differences)
    if groups < 2:
        return None
    if not np.any(differences):
        return 1.0
    if 2**groups <= EXCHANGES:
        from scipy import stats  # takes half a second, which most reports need not pay

        found = stats.permutation_test(
            (differences,), lambda d, axis=-1: np.sum(d, axis=axis), permutation_type="samples",
            vectorized=True, n_resamples=EXCHANGES,
        )
        return float(found.pvalue)
    observed, null = float(differences.sum()), _flips(groups, seed) @ differences
    # Sums in another order differ in their last bits.
    reach = 1e-9 * float(np.abs(differences).sum())
    side = min((null >= observed - reach).sum(), (null <= observed + reach).sum())
    return float(min(1.0, 2 * (side + 1) / (len(null) + 1)))


@lru_cache(maxsize=1)
def _flips(groups: int, seed: int) -> Array:
    """Random signs, ``[flips, groups]``: as many as are useful, and as memory allows."""
    count = max(EXCHANGES, min(MOST_FLIPS, FLIPS_BYTES // (8 * groups)))
    signs = np.random.default_rng(seed).integers(0, 2, (count, groups), dtype=np.int8).astype(np.float64)
    return 2 * signs - 1


def exchanged_p_values(
    method: Array, full: Array, differences: Callable[[Array, Array], Array], seed: int
) -> list[float | None]:
    """Two-sided test of many differences at once: method and full cache are exchanged within random groups.

    This is approximate randomisation, as sacrebleu does it for BLEU: it suits any function of sums.

    Args:
        method, full: sums per group ``[groups, columns]``, with the same groups in order.
        differences: from two totals ``[resamples, columns]`` to ``[statistics, resamples]``.

    Returns:
        ``(c + 1) / (n + 1)`` over 9999 exchanges for each statistic; None where it is undefined.
    """
    groups = method.shape[0]
    if groups < 2:
        return [None] * differences(method, full).shape[0]
    kept = np.random.default_rng(seed).integers(0, 2, (EXCHANGES, groups)).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = differences(method.sum(0)[None], full.sum(0)[None])[:, 0]
        drawn = differences(kept @ method + (1 - kept) @ full, kept @ full + (1 - kept) @ method)
    # Sums in another order differ in their last bits; equal texts must not look significant for that.
    nearer = np.abs(drawn) < np.abs(observed)[:, None] * (1 - 1e-9) - 1e-12
    counts = (~nearer).sum(1)  # an exchange without a value counts against the difference
    return [
        float((count + 1) / (EXCHANGES + 1)) if np.isfinite(value) else None
        for count, value in zip(counts, observed, strict=True)
    ]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment; None stays None and does not count."""
    present = [(p, i) for i, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(sorted(present)):
        highest = max(highest, min(1.0, (len(present) - rank) * p))
        adjusted[i] = highest
    return adjusted


def repeat_interval(values: Array) -> tuple[float, float]:
    """Interval in which the median of as many values of another run falls with 95 % probability.

    It lies between two order statistics and assumes no distribution, only that values are
    exchangeable: of n + n values, how many of one run lie below the r-th of the other is
    beta-binomial. Below nine values it is all of them, whose probability is less.
    """
    from scipy import stats  # takes half a second, which most reports need not pay

    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    ordered, rank = np.sort(values), 1
    while 2 * stats.betabinom(n, rank + 1, n - rank).sf((n + 1) // 2 - 1) <= 1 - LEVEL:
        rank += 1
    return float(ordered[rank - 1]), float(ordered[n - rank])


def fitted_slope(x: Array, y: Array) -> tuple[float, float, float]:
    """Least-squares slope of ``y`` over ``x`` with its t interval."""
    from scipy import stats  # takes half a second, which most reports need not pay

    found = stats.linregress(x, y)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 2)) * float(found.stderr)
    return float(found.slope), float(found.slope) - half, float(found.slope) + half
