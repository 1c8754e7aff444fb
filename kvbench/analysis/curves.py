"""Loss due to compression by position in the text, and by distance from the last replaced entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvbench.analysis.rows import NO_DIFFERENCE, Difference, Estimate, row
from kvbench.statistics import GroupSums, bootstrap_intervals
from kvbench.store.faults import remarks_of
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell, DocumentRecord
from kvbench.store.rows import Row

CURVES = ("since", "position")
_SIGNATURES = {
    "since": "nats|mean over targets at that distance from the last replaced entries|v:1",
    "position": "nats|mean over targets with that many text tokens before them|v:1",
}


def is_of_curve(row: Row) -> bool:
    """Whether a row is a point of one of the curves."""
    return str(row.params.get("bin")).partition("=")[0] in CURVES


def curve_rows(cell: Cell, records: Sequence[DocumentRecord], info: TaskInfo) -> list[Row]:
    """Rows of both curves: metric ``nll``, with its difference to ``full`` on the same targets.

    ``params.bin`` is ``since=d``: targets with at least d text tokens (and fewer than the next d) between
    them and the last summary; methods that replace no entries have none. Or it is ``position=d``: targets
    with at least d text tokens before them.
    """
    return [
        *_rows(cell, [(r.group, r.by_distance or {}) for r in records], info, "since"),
        *_rows(cell, [(r.group, r.by_position or {}) for r in records], info, "position"),
    ]


def _rows(
    cell: Cell, curves: Sequence[tuple[str, dict[str, tuple[int, float, float]]]], info: TaskInfo, axis: str
) -> list[Row]:
    bins = sorted({int(name) for _, curve in curves for name in curve})
    groups = sorted({group for group, _ in curves})
    place = {name: i for i, name in enumerate(groups)}
    sums = np.zeros((len(groups), len(bins), 3))
    for group, curve in curves:
        for i, start in enumerate(bins):
            sums[place[group], i] += curve.get(str(start), (0, 0.0, 0.0))
    if not bins:
        return []

    def means(drawn: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """``[2 bins, resamples]``: nll and loss per target of each bin; NaN if a resample has no such target."""
        part = drawn[0].reshape(-1, len(bins), 3)
        return (part[..., 1:] / part[..., :1]).reshape(len(part), -1).T

    with np.errstate(divide="ignore", invalid="ignore"):
        found = bootstrap_intervals([GroupSums(sums.reshape(len(groups), -1))], means, cell.seed)
    intervals = found.reshape(len(bins), 2, 2)
    rows = []
    for i, start in enumerate(bins):
        count, nll, loss = sums[:, i].sum(0)
        (low, high), (delta_low, delta_high) = intervals[i]
        apart = Estimate.of(loss / count, (delta_low, delta_high))
        params = {
            "seq_len": info.seq_len, "batch_size": None, "new_tokens": None, "step": None, "bin": f"{axis}={start}",
            "position_rule": cell.position_rule, **remarks_of(cell), **cell.options,
        }
        rows.append(row(
            cell, "nll", f"{info.signature}|{_SIGNATURES[axis]}", Estimate.of(nll / count, (low, high)),
            NO_DIFFERENCE if cell.method == "full" else Difference(apart, None, "full"), unit="token", n=int(count),
            groups=int((sums[:, i, 0] > 0).sum()), params=params,
        ))
    return rows
