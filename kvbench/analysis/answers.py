"""Rows of a task that asks questions: accuracy, also by bin and by question, evidence held, and what full had right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvbench import metrics
from kvbench.analysis.estimates import CellSums, bin_rows
from kvbench.analysis.survival import survival_rows
from kvbench.metrics.answers import ANSWERED, FLOOR, RIGHT
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell
from kvbench.store.rows import Row

Records = dict[str, AnswerRecord]

_MEMORY = ("raw", "held", "kv_logical", "kv_physical", "kv_full")


def answer_rows(measured: Sequence[tuple[Cell, Records]], info: TaskInfo) -> list[Row]:
    """Rows of a task, with unadjusted p-values, and of its bins, questions and evidence, which are not tested.

    Where the full cache itself is below the floor, rows say so (``under_floor``), and their differences mean little.
    """
    names = info.documents
    rows = _rows(measured, names, info, None, (*ANSWERED, *metrics.MEMORY))
    bins = {records[name].bin for _, records in measured for name in names}
    for one in sorted(name for name in bins if name is not None):
        rows += _accuracy(measured, [name for name in names if measured[0][1][name].bin == one], info, one)
    rows += _question_rows(measured, info) + survival_rows(measured, info)
    accuracy = next((row.value for row in rows if row.method == "full" and row.metric == "answer_accuracy"), None)
    if accuracy is not None and accuracy < FLOOR:
        rows = [replace(row, params={**row.params, "under_floor": True}) for row in rows]
    return rows


def _question_rows(measured: Sequence[tuple[Cell, Records]], info: TaskInfo) -> list[Row]:
    """Rows of the accuracy of the first, second ... question about a context (``params.bin`` is ``question=1``);
    none where contexts have one question each."""
    most = max((len(records[name].answers) for _, records in measured for name in info.documents), default=0)
    rows: list[Row] = []
    for number in range(most if most > 1 else 0):
        names = [name for name in info.documents if len(measured[0][1][name].answers) > number]
        asked = [
            (cell, {name: replace(records[name], answers=(records[name].answers[number],)) for name in names})
            for cell, records in measured
        ]
        rows += _accuracy(asked, names, info, f"question={number + 1}")
    return rows


def _accuracy(
    measured: Sequence[tuple[Cell, Records]], names: Sequence[str], info: TaskInfo, bin_name: str
) -> list[Row]:
    """Rows of the accuracy of a part of the samples or questions. They are not tested: parts are small, and as further
    tests they would weaken those of the whole."""
    accuracy = [metric for metric in ANSWERED if metric.name == "answer_accuracy"]
    return [replace(row, p_value=None) for row in _rows(measured, names, info, bin_name, accuracy)]


def _rows(
    measured: Sequence[tuple[Cell, Records]], names: Sequence[str], info: TaskInfo, bin_name: str | None,
    kinds: Sequence[metrics.Metric],
) -> list[Row]:
    full = next((records for cell, records in measured if cell.name == "full"), None)
    parts = [_summed(cell, [records[name] for name in names], full) for cell, records in measured]
    return bin_rows(parts, kinds, info, bin_name)


def _summed(cell: Cell, records: Sequence[AnswerRecord], full: Records | None) -> CellSums:
    """Columns by group; a sample has the same weight whatever the number of its questions."""
    groups = sorted({record.group for record in records})
    place = {group: number for number, group in enumerate(groups)}
    columns = (*_MEMORY, "visible", "queries", "pieces", "score", "questions", "survival", "survivals", "negative",
               "full_right", "written", "full_written")
    sums = {name: np.zeros(len(groups)) for name in columns}
    for record in records:
        at, held = place[record.group], record.evidence
        for name in _MEMORY:
            sums[name][at] += getattr(record, name) or 0
        sums["pieces"][at] += record.contexts
        sums["score"][at] += record.score
        sums["questions"][at] += 1
        if held is not None:
            sums["survival"][at] += held
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
