"""The largest ratio of a method without significant loss, from the paired tests of its cells against the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvbench import metrics
from kvbench.analysis.rows import Difference, Estimate, over_ratios, row, settings
from kvbench.metrics.largest_ratio import LARGEST_RATIO, LARGEST_RATIO_SIGNATURE
from kvbench.statistics import SIGNIFICANT, holm, smallest_p_value
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell, DocumentRecord
from kvbench.store.rows import Row

Records = Sequence[DocumentRecord] | Sequence[AnswerRecord]

FOUND, NONE, TOO_FEW = "found", "none", "too few samples"
"""What is found of a method: a ratio; none, since the smallest loses; or no claim, since no test could show a loss."""
_TESTED = {
    metric.name: metric.tested for metric in (*metrics.LM_METRICS, *metrics.RECALL_METRICS, *metrics.ANSWERED)
    if metric.name in ("ppl", "accuracy", "answer_accuracy")
}
"""Metrics that losses are judged by, and the columns of records that their tests compare."""


@dataclass(frozen=True)
class _Tested:
    """The test of a method at one ratio.

    Attributes:
        row: with the Holm-adjusted p-value.
        groups, differing: number of groups, and of those whose difference to ``full`` is not 0.
        least: smallest adjusted p-value that these differences could have given, whatever their signs, beside the
            other tests as they are; where no group differs, the smallest that as many groups could give at all.
    """

    ratio: float
    row: Row
    groups: int
    differing: int
    least: float

    @property
    def loses(self) -> bool:
        """Whether the method is significantly worse than the full cache."""
        row, worse = self.row, 1 if metrics.SHOWN[self.row.metric].better == "low" else -1
        return row.p_value is not None and row.p_value < SIGNIFICANT and (row.delta or 0.0) * worse > 0

    @property
    def could_lose(self) -> bool:
        """Whether a loss could have been significant."""
        return self.least < SIGNIFICANT


def largest_ratio_rows(
    raw: Sequence[Row], adjusted: Sequence[Row], measured: Sequence[tuple[Cell, Records]], info: TaskInfo
) -> list[Row]:
    """One row for each method with at least two ratios, and each metric that its losses are judged by.

    The value is the largest ratio such that neither it nor a smaller one that was measured loses significantly, and at
    which a loss could have been significant; None if there is none. ``params`` say which metric (``of``), the
    ``outcome``, the smallest ratio that loses (``loses_at``), and at which ratios too few samples differ from the full
    cache for any significance (``untested``: ratio -> how many of how many). The difference is that at the value.

    Args:
        raw: rows of the task, with p-values that are not adjusted; ``adjusted``: the same rows, after it.
        measured: the cells of these rows with their records, in the same order of documents.
    """
    full = next((records for cell, records in measured if cell.name == "full"), None)
    if full is None or any(row.params.get("under_floor") for row in adjusted):
        return []
    rows = []
    for metric, column in _TESTED.items():
        if column is None or not any(row.metric == metric for row in raw):
            continue
        by_method: dict[str, list[tuple[Cell, _Tested]]] = {}
        for cell, records in measured:
            tested = _tested(cell, _differences(records, full, column), metric, raw, adjusted)
            if tested is not None:
                by_method.setdefault(cell.name, []).append((cell, tested))
        rows += [
            _row(cells[0][0], sorted((tested for _, tested in cells), key=lambda tested: tested.ratio), info)
            for cells in by_method.values() if len({tested.ratio for _, tested in cells}) > 1
        ]
    return rows


def _differences(records: Records, full: Records, column: str) -> tuple[int, int]:
    """Number of groups, and of those whose sums of a column differ from the full cache's."""
    sums: dict[str, list[float]] = {}
    for place, some in enumerate((records, full)):
        for record in some:
            sums.setdefault(record.group, [0.0, 0.0])[place] += getattr(record, column)
    return len(sums), int(np.count_nonzero(np.diff(list(sums.values()))))


def _tested(
    cell: Cell, differences: tuple[int, int], metric: str, raw: Sequence[Row], adjusted: Sequence[Row]
) -> _Tested | None:
    """The test of a cell; None if it has none, or no ratio."""
    if cell.ratio_asked is None:
        return None
    ratio, (groups, differing) = float(cell.ratio_asked), differences
    places = [i for i, row in enumerate(raw) if row.metric == metric]
    mine = next((
        number for number, i in enumerate(places)
        if (raw[i].name, raw[i].ratio_asked, raw[i].params.get("bin")) == (cell.name, ratio, None)
    ), None)
    if mine is None or raw[places[mine]].p_value is None:
        return None
    p_values = [raw[i].p_value for i in places]
    p_values[mine] = smallest_p_value(groups, differing or groups)
    least = holm(p_values)[mine]
    return _Tested(ratio, adjusted[places[mine]], groups, differing, 1.0 if least is None else least)


def _row(cell: Cell, tested: Sequence[_Tested], info: TaskInfo) -> Row:
    """The row of a method, given its tests by ascending ratio."""
    lost = next((one for one in tested if one.loses), None)
    without = [one for one in tested if lost is None or one.ratio < lost.ratio]
    best = next((one for one in reversed(without) if one.could_lose), None)
    outcome = FOUND if best else TOO_FEW if without else NONE
    metric = tested[0].row.metric
    params = {
        **settings(cell, info, over_ratios([one.ratio for one in tested])), "of": metric, "outcome": outcome,
        "loses_at": None if lost is None else lost.ratio,
        "untested": {f"{one.ratio:g}": [one.differing, one.groups] for one in without if not one.could_lose},
    }
    apart = Difference() if best is None else Difference(
        Estimate(best.row.delta, best.row.delta_ci_low, best.row.delta_ci_high), None, best.row.baseline,
    )
    first = tested[0].row
    return row(
        replace(cell, ratio_asked=None), LARGEST_RATIO, f"{info.signature}|{metric}|{LARGEST_RATIO_SIGNATURE}",
        Estimate(None if best is None else best.ratio), apart, unit=first.unit, n=first.n, groups=first.groups,
        params=params,
    )
