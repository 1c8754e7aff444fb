"""Confidence intervals, paired tests, Holm's correction and rank correlations. The unit of resampling is the group of
documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 5000
LEVEL = 0.95
EXCHANGES = 9999
MOST_FLIPS, FLIPS_BYTES = 199_999, 1 << 28

SIGNIFICANT = 0.05
"""Differences with a smaller p-value are called significant."""


class GroupSums:
    """Sums per group, ``[groups, columns]``; their resampled totals are cached by seed."""

    def __init__(self, sums: Array) -> None:
        self.sums = sums
        self._totals: dict[int, Array] = {}

    def totals(self, seed: int, weights: Array) -> Array:
        """Totals of the columns in every resample, ``[resamples, columns]``."""
        if seed not in self._totals:
            used = self.sums.any(0)  # most bins of a histogram are empty
            totals = np.zeros((len(weights), self.sums.shape[1]))
            totals[:, used] = weights @ self.sums[:, used]
            self._totals[seed] = totals
        return self._totals[seed]


@lru_cache(maxsize=1)
def _weights(groups: int, seed: int) -> Array:
    """How often each resample contains each group, ``[resamples, groups]``. Cached, since the cells of a run usually
    have the same groups and seed."""
    drawn = np.random.default_rng(seed).integers(0, groups, (RESAMPLES, groups))
    rows = np.arange(RESAMPLES)[:, None] * groups
    return np.bincount((drawn + rows).ravel(), minlength=RESAMPLES * groups).reshape(RESAMPLES, groups).astype(float)


def bootstrap_intervals(
    tables: Sequence[GroupSums], values: Callable[[Sequence[Array]], Array], seed: int, may_lack: float = 0.0
) -> Array:
    """Percentile bootstrap intervals of many statistics, all from the same resampling of groups.

    Args:
        tables: all with the same groups in the same order.
        values: function from the resampled totals, ``[resamples, columns]`` per table, to ``[statistics, resamples]``.
        seed: seed of the resampling; the same seed gives the same interval.
        may_lack: largest share of the resamples in which a statistic may be undefined (NaN); these are left out.

    Returns:
        ``[statistics, 2]``, low and high ends; NaN if there are fewer than two groups, or too many undefined resamples.
    """
    groups = tables[0].sums.shape[0]
    if groups < 2:
        size = values([table.sums.sum(0)[None] for table in tables]).shape[0]
        return np.full((size, 2), np.nan)

    # Same result as scipy.stats.bootstrap with method="percentile", which would resample anew for every cell: a
    # report of 10,000 records took twice as long.
    weights = _weights(groups, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = values([table.totals(seed, weights) for table in tables])
    tail = (1 - LEVEL) / 2
    ends = [100 * tail, 100 * (1 - tail)]
    if may_lack:
        lacking = np.isnan(found).mean(-1)
        kept = [np.nan if share > may_lack else row[~np.isnan(row)] for row, share in zip(found, lacking, strict=True)]
        return np.array([np.percentile(row, ends) for row in kept])
    interval: Array = np.percentile(found, ends, axis=-1)
    return interval.T


def paired_p_value(differences: Array, seed: int) -> float | None:
    """Two-sided sign-flip permutation test of the hypothesis that the groups' differences are centred on zero.

    Exact if there are few groups; otherwise ``(c + 1) / (n + 1)`` over up to 199,999 random flips. The flips are the
    same for all differences with as many groups, so they are drawn only once. With fewer flips, no p-value of a large
    grid could survive Holm's correction.
    """
    groups = len(differences)
    if groups < 2:
        return None
    if not np.any(differences):
        return 1.0
    if 2**groups <= EXCHANGES:
        from scipy import stats  # imported late: takes half a second

        found = stats.permutation_test(
            (differences,), lambda d, axis=-1: np.sum(d, axis=axis), permutation_type="samples",
            vectorized=True, n_resamples=EXCHANGES,
        )
        return float(found.pvalue)
    observed, null = float(differences.sum()), _flips(groups, seed) @ differences
    # Summing in another order changes the last bits.
    reach = 1e-9 * float(np.abs(differences).sum())
    side = min((null >= observed - reach).sum(), (null <= observed + reach).sum())
    return float(min(1.0, 2 * (side + 1) / (len(null) + 1)))


def smallest_p_value(groups: int, differing: int) -> float:
    """The smallest p-value that :func:`paired_p_value` can give, which is that of differences of one sign.

    Args:
        groups: number of groups; ``differing``: of those among them whose difference is not 0. The others change
            nothing when their sign is flipped.
    """
    if groups < 2 or not differing:
        return 1.0
    least = 2.0 ** (1 - differing)
    return least if 2**groups <= EXCHANGES else max(least, 2 / (_number_of_flips(groups) + 1))


def least_groups(tests: int) -> int | None:
    """The fewest groups with which the test of paired differences can find any of ``tests`` differences significant.

    All groups differ in one direction then, and Holm's correction multiplies the smallest p-value by the number of
    tests. None if there are so many tests that no number of groups is enough.
    """
    return next((n for n in range(2, 64) if tests * smallest_p_value(n, n) < SIGNIFICANT), None)


def _number_of_flips(groups: int) -> int:
    """As many flips as memory allows, from 9999 to 199,999."""
    return max(EXCHANGES, min(MOST_FLIPS, FLIPS_BYTES // (8 * groups)))


@lru_cache(maxsize=1)
def _flips(groups: int, seed: int) -> Array:
    """Random signs, ``[flips, groups]``."""
    count = _number_of_flips(groups)
    signs = np.random.default_rng(seed).integers(0, 2, (count, groups), dtype=np.int8).astype(np.float64)
    return 2 * signs - 1


def exchanged_p_values(
    method: Array, full: Array, differences: Callable[[Array, Array], Array], seed: int
) -> list[float | None]:
    """Two-sided tests of many differences at once, by exchanging method and full cache within random groups.

    This is approximate randomisation, as in sacrebleu for BLEU; it works for any function of sums.

    Args:
        method, full: sums per group ``[groups, columns]``, with the same groups in the same order.
        differences: function from two totals ``[resamples, columns]`` to ``[statistics, resamples]``.

    Returns:
        ``(c + 1) / (n + 1)`` over 9999 exchanges for each statistic; None if the statistic is undefined.
    """
    groups = method.shape[0]
    if groups < 2:
        return [None] * differences(method, full).shape[0]
    kept = np.random.default_rng(seed).integers(0, 2, (EXCHANGES, groups)).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = differences(method.sum(0)[None], full.sum(0)[None])[:, 0]
        drawn = differences(kept @ method + (1 - kept) @ full, kept @ full + (1 - kept) @ method)
    # Summing in another order changes the last bits; equal texts must not look significant because of that.
    nearer = np.abs(drawn) < np.abs(observed)[:, None] * (1 - 1e-9) - 1e-12
    counts = (~nearer).sum(1)  # exchanges with an undefined value count against the difference
    return [
        float((count + 1) / (EXCHANGES + 1)) if np.isfinite(value) else None
        for count, value in zip(counts, observed, strict=True)
    ]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's step-down method; None stays None and is not counted as a test."""
    present = [(p, i) for i, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(sorted(present)):
        highest = max(highest, min(1.0, (len(present) - rank) * p))
        adjusted[i] = highest
    return adjusted


def rank_correlations(x: Array, y: Array, weights: Array) -> Array:
    """Spearman's correlation of points that occur several times or not at all, as in resamples.

    Args:
        x, y: ``[points]``; ``weights``: how often each of them occurs, ``[resamples, points]``.

    Returns:
        ``[resamples]``; NaN where x or y is constant. It is scipy.stats.spearmanr of the points written out, which
        would rank them one resample after the other.
    """
    total = weights.sum(-1)
    a, b = (_mid_ranks(values, weights) - (total[:, None] + 1) / 2 for values in (x, y))
    spread = np.sqrt((weights * a * a).sum(-1) * (weights * b * b).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        # Ranks are multiples of one half: what is smaller is a rounding error.
        found: Array = np.where(spread > 1e-6, (weights * a * b).sum(-1) / spread, np.nan)
    return found


def _mid_ranks(values: Array, weights: Array) -> Array:
    """Ranks from 1 of points that occur ``weights`` times, equal ones with their mean: ``[resamples, points]``."""
    _, place = np.unique(values, return_inverse=True)
    counts = weights @ np.eye(place.max() + 1)[place]
    ranks: Array = (np.cumsum(counts, -1) - counts / 2 + 0.5)[:, place]
    return ranks


def repeat_interval(values: Array) -> tuple[float, float]:
    """Interval that contains the median of another run of as many values with 95 % probability.

    Its ends are order statistics. No distribution is assumed, only that values are exchangeable: of n + n values,
    the number of one run below the r-th of the other is beta-binomial. With fewer than nine values the interval
    is their range, and its probability is lower.
    """
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    ordered, rank = np.sort(values), _repeat_rank(n)
    return float(ordered[rank - 1]), float(ordered[n - rank])


@cache
def _repeat_rank(n: int) -> int:
    """The rank, from either end, of the ends of :func:`repeat_interval` of ``n`` values."""
    from scipy import stats  # imported late: takes half a second

    rank = 1
    while 2 * stats.betabinom(n, rank + 1, n - rank).sf((n + 1) // 2 - 1) <= 1 - LEVEL:
        rank += 1
    return rank


def fitted_slope(x: Array, y: Array) -> tuple[float, float, float]:
    """Least-squares slope of ``y`` over ``x``, and the low and high ends of its t interval."""
    from scipy import stats  # imported late: takes half a second

    found = stats.linregress(x, y)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 2)) * float(found.stderr)
    return float(found.slope), float(found.slope) - half, float(found.slope) + half
