"""From records on disk to rows with intervals and paired differences; needs no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvbench import metrics
from kvbench.metrics import KL_BINS, Metric
from kvbench.reporting.distance import distance_rows
from kvbench.statistics import bootstrap_intervals, holm, paired_p_value
from kvbench.store.folder import RunFolder
from kvbench.store.records import Cell, DocumentRecord, Failure, Results, Row

Array = NDArray[np.float64]

_SUMS = (
    "pieces", "tokens", "n_bytes", "nll", "hits", "correct", "kl", "top1", "raw", "held",
    "visible", "queries", "kv_logical", "kv_physical", "kv_full",
)


@dataclass(frozen=True)
class _Measured:
    """A cell with its records of one bin, aggregated by group.

    Attributes:
        groups: names, sorted.
        sums: column -> ``[groups]``, or ``[groups, bins]`` for ``kl_bins``.
    """

    cell: Cell
    n: int
    groups: tuple[str, ...]
    sums: dict[str, Array]
    peak: int
    mean_peak: float
    has_kl: bool

    def totals(self) -> dict[str, Array]:
        return {name: column.sum(0)[None] for name, column in self.sums.items()}


def compute_results(folder: RunFolder) -> Results:
    """All rows of a run, from what is on disk.

    Raises:
        UserError: not a run folder, or damaged.
    """
    manifest = folder.manifest()
    cells = folder.cells()
    failures = [f for f in (folder.failure(cell) for cell in cells) if f is not None]
    rows: list[Row] = []
    for task in dict.fromkeys(cell.task for cell in cells):
        info = manifest["tasks"][task]
        chosen = info["documents"]
        measured: list[tuple[Cell, list[DocumentRecord]]] = []
        for cell in (c for c in cells if c.task == task):
            found = folder.records(cell)
            present = [found[name] for name in chosen if name in found]
            if len(present) == len(chosen):
                measured.append((cell, present))
            elif not any(f.cell == cell.key for f in failures):
                failures.append(Failure(
                    cell.key, f"{cell.label}: {len(present)} of {len(chosen)} documents are done.",
                    "Run the same command again to continue.",
                ))
        rows += _task_rows(measured, info)
    return Results(str(folder.path), not failures, tuple(failures), tuple(rows))


def _task_rows(measured: list[tuple[Cell, list[DocumentRecord]]], info: dict[str, Any]) -> list[Row]:
    """Rows of a task and of its bins; p-values are adjusted here, within each metric."""
    kinds: tuple[Metric, ...] = metrics.ANSWER_METRICS if info.get("answers") else metrics.LM_METRICS
    if info["kind"] == "recall":
        kinds = metrics.RECALL_METRICS
    rows = _bin_rows([_aggregate(c, r) for c, r in measured], kinds, info, None)
    bins = list(dict.fromkeys(r.bin for _, records in measured for r in records if r.bin is not None))
    tested = tuple(m for m in kinds if m.tested or (info["kind"] == "online" and m in metrics.MEMORY))
    for name in sorted(bins, key=_bin_order):
        parts = [_aggregate(c, [r for r in records if r.bin == name]) for c, records in measured]
        rows += _bin_rows(parts, tested, info, name)
    if info["kind"] != "recall":  # its targets all lie at the same few distances
        rows += [row for cell, records in measured for row in distance_rows(cell, records, info)]
    for metric in dict.fromkeys(row.metric for row in rows):
        places = [i for i, row in enumerate(rows) if row.metric == metric]
        for i, p in zip(places, holm([rows[i].p_value for i in places]), strict=True):
            rows[i] = replace(rows[i], p_value=p)
    return rows


def _bin_order(name: str) -> tuple[str, float]:
    label, _, number = name.partition("=")
    return label, float(number or 0)


def _aggregate(cell: Cell, records: list[DocumentRecord]) -> _Measured:
    has_kl = all(r.kl is not None for r in records)
    frame = pd.DataFrame([{name: getattr(r, name) for name in (*_SUMS, "group")} for r in records])
    frame[["kl", "top1"]] = frame[["kl", "top1"]].astype(float)
    by_group = frame.groupby("group", sort=True).sum()
    sums: dict[str, Array] = {name: by_group[name].to_numpy(dtype=np.float64) for name in _SUMS}
    if has_kl:
        index = {name: i for i, name in enumerate(by_group.index)}
        bins = np.zeros((len(index), KL_BINS))
        for r in records:
            for place, count in (r.kl_bins or {}).items():
                bins[index[r.group], int(place)] += count
        sums["kl_bins"] = bins
    return _Measured(
        cell, len(records), tuple(by_group.index), sums, max(r.peak for r in records),
        sum(r.peak for r in records) / len(records), has_kl,
    )


def _bin_rows(
    parts: list[_Measured], kinds: Sequence[Metric], info: dict[str, Any], bin_name: str | None
) -> list[Row]:
    """Rows of one task, or of one bin of it, with p-values as they come."""
    full = next((p for p in parts if p.cell.method == "full"), None)
    none = next((p for p in parts if p.cell.method == "none"), None)
    per_part = [_rows_of(p, full, none, kinds, info, bin_name) for p in parts]
    rows = [row for part in per_part for row in part]
    order = list(dict.fromkeys(row.metric for row in rows))
    return sorted(rows, key=lambda row: order.index(row.metric))


def _rows_of(
    part: _Measured, full: _Measured | None, none: _Measured | None, kinds: Sequence[Metric],
    info: dict[str, Any], bin_name: str | None,
) -> list[Row]:
    kinds = [m for m in kinds if part.has_kl or not m.name.startswith(("kl", "top1"))]
    pairable = full is not None and full is not part and full.groups == part.groups
    baseline = full if pairable else None
    gap = none if baseline and none and none is not part and none.groups == part.groups else None
    values, intervals = _estimates(part, baseline, gap, kinds)
    rows, sampled = [], [m for m in kinds if m.has_interval]
    for metric in kinds:
        at = sampled.index(metric) if metric in sampled else None
        delta_at = len(sampled) + at if at is not None and metric.tested and baseline else None
        p_value = None
        if baseline is not None and metric.tested:
            difference = part.sums[metric.tested] - baseline.sums[metric.tested]
            p_value = paired_p_value(difference, part.cell.seed)
        value = float(metric.value(part.totals())[0])
        rows.append(_row(part, info, bin_name, metric.name, metric.signature, metric.unit,
                         value, _pair(intervals, at), _at(values, delta_at),
                         _pair(intervals, delta_at), p_value, baseline))
    if gap is not None and bin_name is None and any(m.name == "ppl" for m in kinds):
        useful = _useful_gap(intervals[-1])
        rows.insert(3, _row(
            part, info, bin_name, "recovery", metrics.RECOVERY_SIGNATURE, "document",
            _at(values, len(values) - 2) if useful else None,
            _pair(intervals, len(values) - 2) if useful else (None, None),
            None, (None, None), None, None,
        ))
    return rows


def _estimates(
    part: _Measured, full: _Measured | None, none: _Measured | None, kinds: Sequence[Metric]
) -> tuple[Array, Array]:
    """Values and intervals of: each sampled metric; its difference to ``full``; recovery; the gap
    full to none that recovery divides by (the last two only where there is a ``none``)."""
    sampled = [m for m in kinds if m.has_interval]
    others = [p for p in (full, none) if p is not None]
    tables, slices = _stack([part, *others])

    def values(drawn: Sequence[Array]) -> Array:
        totals = [_unstack(table, where) for table, where in zip(drawn, slices, strict=True)]
        out = [m.value(totals[0]) for m in sampled]
        if full is not None:
            out += [
                m.value(totals[0]) - m.value(totals[1]) if m.tested else np.zeros_like(out[0])
                for m in sampled
            ]
        if full is not None and none is not None:
            out.append(metrics.recovery(totals[0], totals[1], totals[2]))
            out.append((totals[2]["nll"] - totals[1]["nll"]) / totals[1]["tokens"])
        return np.stack([np.broadcast_to(np.asarray(o, dtype=np.float64), out[0].shape) for o in out])

    with np.errstate(divide="ignore", invalid="ignore"):
        point = values([table.sum(0)[None] for table in tables])[:, 0]
    return point, bootstrap_intervals(tables, values, part.cell.seed)


def _stack(parts: list[_Measured]) -> tuple[list[Array], list[dict[str, slice]]]:
    """Each part's columns side by side as one table ``[groups, columns]``."""
    tables, slices = [], []
    for p in parts:
        columns, where, start = [], {}, 0
        for name, column in p.sums.items():
            block = column if column.ndim == 2 else column[:, None]
            where[name] = slice(start, start + block.shape[1])
            start += block.shape[1]
            columns.append(block)
        tables.append(np.concatenate(columns, axis=1))
        slices.append(where)
    return tables, slices


def _unstack(table: Array, where: dict[str, slice]) -> dict[str, Array]:
    return {
        name: table[:, at] if name == "kl_bins" else table[:, at.start] for name, at in where.items()
    }


def _useful_gap(interval: Array) -> bool:
    """Whether the interval of the gap full to none excludes 0, so that recovery means something."""
    return bool(np.isfinite(interval).all() and (interval[0] > 0 or interval[1] < 0))


def _row(
    part: _Measured, info: dict[str, Any], bin_name: str | None, name: str, signature: str,
    unit: str, value: float | None, interval: tuple[float | None, float | None],
    delta: float | None, delta_interval: tuple[float | None, float | None],
    p_value: float | None, baseline: _Measured | None,
) -> Row:
    cell, totals = part.cell, {k: float(v.sum()) for k, v in part.sums.items()}
    step = bin_name.removeprefix("step=") if bin_name else ""
    params: dict[str, Any] = {
        "seq_len": info["seq_len"], "batch_size": None, "new_tokens": None,
        "step": int(step) if step.isdecimal() else None, "bin": bin_name,
        "adapter": None if cell.adapter is None else Path(cell.adapter).name,
        "entries_peak_mean": part.mean_peak, "entry_bytes": totals["kv_full"] / totals["raw"],
        "position_rule": cell.position_rule, **cell.options,
    }
    return Row(
        task=cell.task, protocol=cell.protocol, model=cell.model, method=cell.method,
        ratio_asked=None if cell.ratio_asked is None else float(cell.ratio_asked),
        ratio_realised=1 - totals["held"] / totals["raw"],
        ratio_mean=1 - totals["visible"] / totals["queries"] if totals["queries"] else None,
        entries_peak=part.peak, removal="real" if cell.execution == "streamed" else "masked",
        params=params, groups=len(part.groups), metric=name, value=_finite(value),
        ci_low=interval[0], ci_high=interval[1],
        n=int(totals["pieces"]) if unit == "sequence" else part.n, unit=unit,
        delta=delta, delta_ci_low=delta_interval[0], delta_ci_high=delta_interval[1],
        p_value=p_value, baseline="full" if baseline is not None and delta is not None else None,
        seed=cell.seed, signature=f"{name}:{info['signature']}|{signature}",
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _at(values: Array, place: int | None) -> float | None:
    return None if place is None else _finite(float(values[place]))


def _pair(intervals: Array, place: int | None) -> tuple[float | None, float | None]:
    if place is None:
        return None, None
    return _finite(float(intervals[place, 0])), _finite(float(intervals[place, 1]))
