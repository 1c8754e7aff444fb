"""From records on disk to rows with intervals and paired differences; needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvbench import metrics
from kvbench.analysis.answers import answer_rows
from kvbench.analysis.curves import curve_rows
from kvbench.analysis.estimates import CellSums, bin_rows
from kvbench.analysis.largest_ratio import Records, largest_ratio_rows
from kvbench.analysis.profile import profile_results
from kvbench.analysis.texts import generation_rows
from kvbench.errors import UserError
from kvbench.metrics import KL_BINS, Metric
from kvbench.statistics import holm
from kvbench.store.folder import RunFolder
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell, DocumentRecord, Failure
from kvbench.store.rows import Results, Row

Array = NDArray[np.float64]

_SUMS = (
    "pieces", "tokens", "n_bytes", "nll", "hits", "correct", "kl", "top1", "raw", "held",
    "visible", "queries", "kv_logical", "kv_physical", "kv_full",
)


def compute_results(folder: RunFolder, only: Sequence[str] = ()) -> Results:
    """Compute all rows of a run from the records on disk.

    Args:
        only: metrics of generated text to include; all if empty.

    Raises:
        UserError: the folder is not a run folder, or is damaged.
    """
    manifest = folder.manifest()
    cells = manifest.cells
    failures = [f for f in (folder.failure(cell) for cell in cells) if f is not None]
    rows: list[Row] = []
    for setting in dict.fromkeys(cell.setting for cell in cells):
        info, mine = manifest.tasks.get(setting), [cell for cell in cells if cell.setting == setting]
        if profile := manifest.profiles.get(setting):
            found, lacking = profile_results(folder, profile, mine)
            rows += _adjusted(found)
            failures += lacking
            continue
        if info is None:  # a sweep has not begun this setting yet
            failures += _not_begun(mine, failures)
            continue
        chosen = info.documents
        complete: list[Cell] = []
        for cell in mine:
            try:
                present = folder.documents(cell) & set(chosen)
            except UserError as damage:
                failures = [f for f in failures if f.cell != cell.key]
                failures.append(Failure(cell.key, f"{cell.label}: {damage.message}", damage.hint))
                continue
            if len(present) == len(chosen):
                complete.append(cell)
            elif not any(f.cell == cell.key for f in failures):
                failures.append(Failure.to_go_on(cell, f"{len(present)} of {len(chosen)} documents are done"))
        rows += _task_rows(folder, complete, info, only)
    return Results(str(folder.path), all(f.left_out for f in failures), tuple(failures), tuple(rows))


def _task_rows(folder: RunFolder, cells: Sequence[Cell], info: TaskInfo, only: Sequence[str]) -> list[Row]:
    """Rows of a task from its complete cells, with adjusted p-values."""
    if info.kind == "generation":
        return _adjusted([row for row in generation_rows(folder, cells, info) if _is_shown(row.metric, only)])
    measured: list[tuple[Cell, Records]]
    if info.asks:
        answers = [(cell, folder.answers(cell)) for cell in cells]
        found = answer_rows(answers, info)
        measured = [(cell, [records[name] for name in info.documents]) for cell, records in answers]
    else:
        texts = [(cell, folder.records(cell)) for cell in cells]
        scored = [(cell, [records[name] for name in info.documents]) for cell, records in texts]
        found = scored_rows(scored, info)
        measured = [*scored]
    adjusted = _adjusted(found)
    return adjusted + largest_ratio_rows(found, adjusted, measured, info)


def _not_begun(cells: Sequence[Cell], failures: Sequence[Failure]) -> list[Failure]:
    told = {failure.cell for failure in failures}
    return [Failure.to_go_on(cell, "not begun") for cell in cells if cell.key not in told]


def scored_rows(measured: list[tuple[Cell, list[DocumentRecord]]], info: TaskInfo) -> list[Row]:
    """Rows of a task that scores text, and of its bins, with unadjusted p-values."""
    kinds: tuple[Metric, ...] = metrics.ANSWER_METRICS if info.answers else metrics.LM_METRICS
    if info.kind == "recall":
        kinds = metrics.RECALL_METRICS
    rows = bin_rows([_aggregate(c, r) for c, r in measured], kinds, info, None)
    bins = list(dict.fromkeys(r.bin for _, records in measured for r in records if r.bin is not None))
    tested = tuple(m for m in kinds if m.tested or (info.kind == "online" and m in metrics.MEMORY))
    for name in sorted(bins, key=_bin_order):
        parts = [_aggregate(c, [r for r in records if r.bin == name]) for c, records in measured]
        rows += bin_rows(parts, tested, info, name)
    if info.kind != "recall":  # its targets all lie at the same few distances
        rows += [row for cell, records in measured for row in curve_rows(cell, records, info)]
    return rows


def _is_shown(metric: str, only: Sequence[str]) -> bool:
    return not only or metric in only or metric not in metrics.GENERATION_NAMES


def _adjusted(rows: list[Row]) -> list[Row]:
    """Adjust the p-values of a task by Holm's method within each metric."""
    rows = list(rows)
    for metric in dict.fromkeys(row.metric for row in rows):
        places = [i for i, row in enumerate(rows) if row.metric == metric]
        for i, p in zip(places, holm([rows[i].p_value for i in places]), strict=True):
            rows[i] = replace(rows[i], p_value=p)
    return rows


def _bin_order(name: str) -> tuple[str, float]:
    label, _, number = name.partition("=")
    return label, float(number or 0)


def _aggregate(cell: Cell, records: list[DocumentRecord]) -> CellSums:
    has_kl = all(r.kl is not None for r in records)
    frame = pd.DataFrame([{name: getattr(r, name) for name in (*_SUMS, "group")} for r in records])
    frame[["kl", "top1"]] = frame[["kl", "top1"]].astype(float)
    by_group = frame.groupby("group", sort=True).sum()
    sums: dict[str, Array] = {name: by_group[name].to_numpy(dtype=np.float64) for name in _SUMS}
    if has_kl:
        index = {name: i for i, name in enumerate(by_group.index)}
        at = [index[r.group] * KL_BINS + int(place) for r in records for place in r.kl_bins or ()]
        counts = [count for r in records for count in (r.kl_bins or {}).values()]
        flat = np.bincount(at, weights=counts, minlength=len(index) * KL_BINS).astype(np.float64)
        sums["kl_bins"] = flat.reshape(len(index), KL_BINS)
    return CellSums(
        cell, len(records), tuple(by_group.index), sums, max(r.peak for r in records),
        sum(r.peak for r in records) / len(records),
        frozenset() if has_kl else frozenset(metric.name for metric in metrics.AGREEMENT),
    )


