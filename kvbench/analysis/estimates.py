"""Values, intervals and paired differences of cells, from records summed by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbench import metrics
from kvbench.analysis.rows import (
    NO_DIFFERENCE,
    NO_INTERVAL,
    Compression,
    Difference,
    Estimate,
    Interval,
    row,
    settings,
)
from kvbench.metrics import Metric
from kvbench.statistics import GroupSums, bootstrap_intervals, exchanged_p_values, paired_p_value
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell
from kvbench.store.rows import Row

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CellSums:
    """The records of a cell, or of one bin of it, summed by group.

    Attributes:
        groups: names of the groups, sorted.
        n: number of documents.
        sums: column -> ``[groups]``, or ``[groups, k]`` for a vector such as ``kl_bins``.
        peak, mean_peak: the most entries ever held: maximum and mean over documents.
        missing_metrics: metrics that the records have no columns for.
    """

    cell: Cell
    n: int
    groups: tuple[str, ...]
    sums: dict[str, Array]
    peak: int
    mean_peak: float
    missing_metrics: frozenset[str] = frozenset()

    @cached_property
    def table(self) -> tuple[GroupSums, dict[str, slice]]:
        """All columns as one table, and the slice of each; cached, since other cells are compared with it."""
        return _stack(self.sums)

    def totals(self) -> dict[str, Array]:
        return {name: column.sum(0)[None] for name, column in self.sums.items()}


def bin_rows(
    parts: list[CellSums], kinds: Sequence[Metric], info: TaskInfo, bin_name: str | None
) -> list[Row]:
    """Rows of one task, or of one bin of it, with unadjusted p-values."""
    full = next((p for p in parts if p.cell.name == "full"), None)
    none = next((p for p in parts if p.cell.name == "none"), None)
    per_part = [_rows_of(p, full, none, kinds, info, bin_name) for p in parts]
    rows = [row for part in per_part for row in part]
    order = list(dict.fromkeys(row.metric for row in rows))
    return sorted(rows, key=lambda row: order.index(row.metric))


def _rows_of(
    part: CellSums, full: CellSums | None, none: CellSums | None, kinds: Sequence[Metric],
    info: TaskInfo, bin_name: str | None,
) -> list[Row]:
    pairable = full is not None and full is not part and full.groups == part.groups
    baseline = full if pairable else None
    kinds = [m for m in kinds if m.name not in part.missing_metrics]
    if not kinds:
        return []
    recovers = any(m.name == "ppl" for m in kinds)
    gap = none if recovers and baseline and none and none is not part and none.groups == part.groups else None
    values, intervals = _estimates(part, baseline, gap, kinds)
    rows, sampled = [], [m for m in kinds if m.has_interval]
    exchanged = _exchanged(part, baseline, [m for m in kinds if m.exchange_test])
    for metric in kinds:
        at = sampled.index(metric) if metric in sampled else None
        compared = bool(metric.tested or metric.exchange_test)
        delta_at = len(sampled) + at if at is not None and compared and baseline else None
        p_value = exchanged.get(metric.name)
        if baseline is not None and metric.tested:
            apart = part.sums[metric.tested] - baseline.sums[metric.tested]
            p_value = paired_p_value(apart, part.cell.seed)
        value = float(metric.value(part.totals())[0])
        rows.append(row_of(
            part, info, bin_name, metric.name, metric.signature, metric.unit,
            Estimate.of(value, _pair(intervals, at)),
            difference_of(Estimate.of(_at(values, delta_at), _pair(intervals, delta_at)), p_value, baseline),
        ))
    if gap is not None and bin_name is None:
        is_useful, last = _useful_gap(intervals[-1]), len(values) - 2
        rows.insert(3, row_of(
            part, info, bin_name, "recovery", metrics.RECOVERY_SIGNATURE, "document",
            Estimate.of(_at(values, last), _pair(intervals, last)) if is_useful else Estimate(),
        ))
    return rows


def difference_of(estimate: Estimate, p_value: float | None, baseline: CellSums | None) -> Difference:
    """The difference to the full cache, if there is one to compare with."""
    return Difference(estimate, p_value, None if baseline is None or estimate.value is None else "full")


def _exchanged(part: CellSums, full: CellSums | None, kinds: Sequence[Metric]) -> dict[str, float | None]:
    """p-values of the metrics that are tested by exchanging method and full cache within random groups."""
    if full is None or not kinds:
        return {}
    names = sorted(set(part.sums) & set(full.sums))
    (mine, where), (theirs, _) = (_stack({name: p.sums[name] for name in names}) for p in (part, full))

    def differences(method: Array, baseline: Array) -> Array:
        one, other = (_unstack(table, where) for table in (method, baseline))
        return np.stack([m.value(one) - m.value(other) for m in kinds])

    found = exchanged_p_values(mine.sums, theirs.sums, differences, part.cell.seed)
    return dict(zip((m.name for m in kinds), found, strict=True))


def _estimates(
    part: CellSums, full: CellSums | None, none: CellSums | None, kinds: Sequence[Metric]
) -> tuple[Array, Array]:
    """Values and intervals of: each metric with an interval; its difference to ``full``; recovery; and the gap
    between ``none`` and ``full`` that recovery divides by (the last two only if there is a ``none``)."""
    sampled = [m for m in kinds if m.has_interval]
    stacked = [_stack(part.sums), *(p.table for p in (full, none) if p is not None)]
    tables, slices = [table for table, _ in stacked], [where for _, where in stacked]

    def values(drawn: Sequence[Array]) -> Array:
        totals = [_unstack(table, where) for table, where in zip(drawn, slices, strict=True)]
        out = [m.value(totals[0]) for m in sampled]
        if full is not None:
            out += [
                m.value(totals[0]) - m.value(totals[1]) if m.tested or m.exchange_test else np.zeros_like(out[0])
                for m in sampled
            ]
        if full is not None and none is not None:
            out.append(metrics.recovery(totals[0], totals[1], totals[2]))
            out.append((totals[2]["nll"] - totals[1]["nll"]) / totals[1]["tokens"])
        return np.stack([np.broadcast_to(np.asarray(o, dtype=np.float64), out[0].shape) for o in out])

    with np.errstate(divide="ignore", invalid="ignore"):
        point = values([table.sums.sum(0)[None] for table in tables])[:, 0]
    return point, bootstrap_intervals(tables, values, part.cell.seed)


def _stack(sums: dict[str, Array]) -> tuple[GroupSums, dict[str, slice]]:
    """Concatenate columns to one table, and return the slice of each."""
    columns, where, start = [], {}, 0
    for name, column in sums.items():
        block = column if column.ndim == 2 else column[:, None]
        where[name] = slice(start, start + block.shape[1])
        start += block.shape[1]
        columns.append(block)
    return GroupSums(np.concatenate(columns, axis=1)), where


def _unstack(table: Array, where: dict[str, slice]) -> dict[str, Array]:
    return {
        name: table[:, at] if at.stop - at.start > 1 else table[:, at.start] for name, at in where.items()
    }


def _useful_gap(interval: Array) -> bool:
    """Whether the interval of the gap between ``none`` and ``full`` excludes 0, so that recovery is meaningful."""
    return bool(np.isfinite(interval).all() and (interval[0] > 0 or interval[1] < 0))


def row_of(
    part: CellSums, info: TaskInfo, bin_name: str | None, name: str, signature: str, unit: str, estimate: Estimate,
    difference: Difference = NO_DIFFERENCE,
) -> Row:
    """Create a row of a cell from its summed records."""
    cell, totals = part.cell, {k: float(v.sum()) for k, v in part.sums.items()}
    step = bin_name.removeprefix("step=") if bin_name else ""
    params: dict[str, Any] = {
        **settings(cell, info, bin_name), "step": int(step) if step.isdecimal() else None,
        "entries_peak_mean": part.mean_peak or None,
        "entry_bytes": totals["kv_full"] / totals["raw"] if totals["raw"] else None,
    }
    compression = Compression(
        1 - totals["held"] / totals["raw"] if totals["raw"] else None,
        1 - totals["visible"] / totals["queries"] if totals["queries"] else None, part.peak or None,
    )
    return row(
        cell, name, f"{info.signature}{_steps(cell)}|{signature}", estimate, difference, unit=unit,
        n=int(totals["pieces"]) if unit == "sequence" else part.n, groups=len(part.groups), params=params,
        compression=compression,
    )


def _steps(cell: Cell) -> str:
    """The part of a signature that says how often a policy evicts; empty for layouts."""
    if "prefill" not in cell.options:
        return ""
    return f"|evicts every {cell.options['step']}, prefix {cell.options['prefill']}"


def _at(values: Array, place: int | None) -> float | None:
    return None if place is None else float(values[place])


def _pair(intervals: Array, place: int | None) -> Interval:
    return NO_INTERVAL if place is None else (float(intervals[place, 0]), float(intervals[place, 1]))
