"""Building a row: an estimate and a difference to a baseline, with the recipe of the cell that they are of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.store.faults import remarks_of
from kvbench.store.records import Cell, Row

Interval = tuple[float | None, float | None]
NO_INTERVAL: Interval = (None, None)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, in the metric's unit; None for what cannot be told."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float | None, interval: Interval = NO_INTERVAL) -> Estimate:
        """From numbers of which some may be infinite or not a number."""
        return cls(_finite(value), *map(_finite, interval))


@dataclass(frozen=True)
class Difference:
    """A paired difference to a baseline.

    Attributes:
        p_value: that it is 0.
        baseline: the method of the other cell; None without a comparison.
    """

    estimate: Estimate = Estimate()
    p_value: float | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Compression:
    """How much smaller a cell's cache was.

    Attributes:
        realised: share of entries removed, when the context had been read.
        mean: the same, mean over queries or steps.
        entries_peak: the most entries ever held.
    """

    realised: float | None = None
    mean: float | None = None
    entries_peak: int | None = None


NO_DIFFERENCE, NOT_KNOWN = Difference(), Compression()


def row(
    cell: Cell, metric: str, signature: str, estimate: Estimate, difference: Difference = NO_DIFFERENCE, *, unit: str,
    n: int, groups: int, params: dict[str, Any], compression: Compression = NOT_KNOWN,
) -> Row:
    """A row of a cell.

    Args:
        signature: all that decides what the number means, after the metric's name.
        unit: what ``n`` counts; ``groups`` the units of resampling.
    """
    return Row(
        task=cell.task, protocol=cell.protocol, model=cell.model, method=cell.method,
        ratio_asked=None if cell.ratio_asked is None else float(cell.ratio_asked),
        ratio_realised=compression.realised, ratio_mean=compression.mean, entries_peak=compression.entries_peak,
        removal=cell.removal, params=params, groups=groups, metric=metric,
        value=estimate.value, ci_low=estimate.low, ci_high=estimate.high, n=n, unit=unit,
        delta=difference.estimate.value, delta_ci_low=difference.estimate.low,
        delta_ci_high=difference.estimate.high, p_value=difference.p_value, baseline=difference.baseline,
        seed=cell.seed, signature=f"{metric}:{signature}",
    )


def remarks(cell: Cell) -> dict[str, Any]:
    """Parameters of every row of a cell: its adapter, its position rule, and what is said of its method."""
    return {
        "adapter": None if cell.adapter is None else Path(cell.adapter).name, "position_rule": cell.position_rule,
        **remarks_of(cell),
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
