"""Creates a row of results from an estimate, a difference to a baseline, and the settings of its cell."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.store.faults import remarks_of
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell
from kvbench.store.rows import Row

Interval = tuple[float | None, float | None]
NO_INTERVAL: Interval = (None, None)
RATIOS = "ratios"
"""Name of the bins of rows that are made of several ratios."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, in the metric's unit; None if undefined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float | None, interval: Interval = NO_INTERVAL) -> Estimate:
        """Create an estimate from numbers; infinity and NaN become None."""
        return cls(_finite(value), *map(_finite, interval))


@dataclass(frozen=True)
class Difference:
    """A paired difference to a baseline.

    Attributes:
        p_value: p-value of the hypothesis that the difference is 0.
        baseline: method of the cell compared with; None if there is none.
    """

    estimate: Estimate = Estimate()
    p_value: float | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Compression:
    """How much a cell's cache was compressed.

    Attributes:
        realised: fraction of entries removed after the context was read.
        mean: mean over queries or decoding steps of the fraction of entries removed.
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
    """Create a row of a cell.

    Args:
        signature: everything that determines what the number means, without the metric's name.
        unit: what ``n`` counts; ``groups``: number of units of resampling.
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


def settings(cell: Cell, info: TaskInfo, bin_name: str | None) -> dict[str, Any]:
    """Parameters of a row of a task: its options, its lengths, its bin, and remarks on its method."""
    asked = {"question": "hidden"} if info.kind == "recall" else {}
    length = {"context_length": context_length(info)} if info.asks else {}
    return {
        **asked, **cell.options, **length, "seq_len": info.seq_len, "batch_size": None, "new_tokens": info.new_tokens,
        "step": None, "bin": bin_name, **remarks(cell),
    }


def context_length(info: TaskInfo) -> int | None:
    """Tokens of prompt and answer in a task of questions; read from the signature, as the option may be ``auto``."""
    found = re.search(r"\|L:(\d+)", info.signature)
    return int(found.group(1)) if found else None


def over_ratios(ratios: Sequence[float]) -> str:
    """The bin of rows that are made of several ratios: ``ratios=0.3+0.5``."""
    return f"{RATIOS}={'+'.join(f'{ratio:g}' for ratio in ratios)}"


def is_over_ratios(row: Row) -> bool:
    """Whether a row is made of several ratios."""
    return str(row.params.get("bin")).startswith(f"{RATIOS}=")


def remarks(cell: Cell) -> dict[str, Any]:
    """Parameters that every row of a cell has: its adapter, its position rule, and remarks on its method."""
    return {
        "adapter": None if cell.adapter is None else Path(cell.adapter).name, "position_rule": cell.position_rule,
        **remarks_of(cell),
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
