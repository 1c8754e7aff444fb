"""Rows of a task that asks questions: accuracy, what was held of the evidence, and what full had right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvbench import metrics
from kvbench.analysis.estimates import CellSums, bin_rows
from kvbench.metrics.answers import ANSWERED, FLOOR, RIGHT
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell
from kvbench.store.rows import Row

Records = dict[str, AnswerRecord]

_MEMORY = ("raw", "held", "kv_logical", "kv_physical", "kv_full")


def answer_rows(measured: Sequence[tuple[Cell, Records]], info: TaskInfo) -> list[Row]:
    """Rows of a task and of its bins, with unadjusted p-values.

    Where the full cache itself is below the floor, rows say so (``under_floor``), and their differences mean little.
    """
    full = next((records for cell, records in measured if cell.name == "full"), None)
    names = info.documents
    rows = _rows(measured, full, names, info, None)
    bins = dict.fromkeys(records[name].bin for _, records in measured for name in names)
    for one in sorted(name for name in bins if name is not None):
        mine = [name for name in names if measured[0][1][name].bin == one]
        rows += [row for row in _rows(measured, full, mine, info, one) if row.metric == "answer_accuracy"]
    accuracy = next((row.value for row in rows if row.method == "full" and row.metric == "answer_accuracy"), None)
    if accuracy is not None and accuracy < FLOOR:
        rows = [replace(row, params={**row.params, "under_floor": True}) for row in rows]
    return rows


def _rows(
    measured: Sequence[tuple[Cell, Records]], full: Records | None, names: Sequence[str], info: TaskInfo,
    bin_name: str | None,
) -> list[Row]:
    parts = [_summed(cell, [records[name] for name in names], full) for cell, records in measured]
    return bin_rows(parts, (*ANSWERED, *metrics.MEMORY), info, bin_name)


def _summed(cell: Cell, records: Sequence[AnswerRecord], full: Records | None) -> CellSums:
    """Columns by group; a sample has the same weight whatever the number of its questions."""
    groups = sorted({record.group for record in records})
    place = {group: number for number, group in enumerate(groups)}
    columns = (*_MEMORY, "visible", "queries", "pieces", "score", "questions", "survival", "survivals", "negative",
               "full_right", "written", "full_written")
    sums = {name: np.zeros(len(groups)) for name in columns}
    for record in records:
        at, count = place[record.group], len(record.answers)
        for name in _MEMORY:
            sums[name][at] += getattr(record, name) or 0
        sums["pieces"][at] += record.contexts
        sums["score"][at] += sum(answer.score for answer in record.answers) / count
        sums["questions"][at] += 1
        if record.survival is not None:
            sums["survival"][at] += float(np.mean(record.survival))
            sums["survivals"][at] += 1
        theirs = full.get(record.document) if full is not None else None
        for mine, other in zip(record.answers, theirs.answers if theirs else (), strict=bool(theirs)):
            is_right = other.score > RIGHT
            sums["full_right"][at] += is_right
            sums["negative"][at] += is_right and mine.score <= RIGHT
            sums["written"][at] += len(mine.ids or ())
            sums["full_written"][at] += len(other.ids or ())
    missing = set()
    if any(record.kv_physical is None for record in records):
        missing |= {metric.name for metric in metrics.MEMORY}
    if sums["survivals"].sum() < len(records):
        missing.add("evidence_survival")
    if not sums["full_right"].sum() or cell.name == "full":
        missing.add("negative_share")
    is_counted = all(answer.ids is not None for record in records for answer in record.answers)
    if not sums["full_written"].sum() or not is_counted or cell.name == "full":
        missing.add("answer_length")
    peaks = [record.peak or 0 for record in records]
    return CellSums(
        cell, len(records), tuple(groups), sums, max(peaks), sum(peaks) / len(peaks), frozenset(missing)
    )
