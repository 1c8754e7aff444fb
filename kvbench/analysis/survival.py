"""Whether the samples whose evidence survives compression are those that are answered rightly: a rank correlation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvbench.analysis.rows import Compression, Estimate, over_ratios, row, settings
from kvbench.metrics.answers import CORRELATION, CORRELATION_SIGNATURE
from kvbench.statistics import GroupSums, bootstrap_intervals, rank_correlations
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell
from kvbench.store.rows import Row

Array = NDArray[np.float64]

MAY_LACK = 0.05
"""Largest share of resamples in which the correlation may be undefined, since only right or only wrong answers were
drawn; with more there is no interval."""


@dataclass(frozen=True)
class _Points:
    """Samples at one ratio or at several, each with the share of its evidence that is held, and its score.

    Attributes:
        groups: group of each point; ``held``, ``scores``: ``[points]``.
        raw, kept: text tokens that were read, and entries held after them, summed over points.
    """

    groups: tuple[str, ...]
    held: Array
    scores: Array
    raw: int
    kept: int

    @classmethod
    def of(cls, records: Sequence[AnswerRecord]) -> _Points:
        """The points of records that all say what of the evidence is held."""
        return cls(
            tuple(r.group for r in records), np.array([r.evidence for r in records], dtype=np.float64),
            np.array([r.score for r in records]), sum(r.raw or 0 for r in records), sum(r.held or 0 for r in records),
        )

    def estimate(self, seed: int) -> Estimate:
        """Spearman's correlation, with an interval over groups; no value where either is constant."""
        from scipy import stats  # imported late: takes half a second

        if len(set(self.held)) < 2 or len(set(self.scores)) < 2:
            return Estimate()
        names = sorted(set(self.groups))
        place = np.array([names.index(group) for group in self.groups])

        def correlations(drawn: Sequence[Array]) -> Array:
            return rank_correlations(self.held, self.scores, drawn[0][:, place])[None]

        # Each group is a column of its own, so that the totals of a resample say how often it has been drawn.
        [(low, high)] = bootstrap_intervals([GroupSums(np.eye(len(names)))], correlations, seed, MAY_LACK)
        return Estimate.of(float(stats.spearmanr(self.held, self.scores).statistic), (low, high))


def survival_rows(measured: Sequence[tuple[Cell, Mapping[str, AnswerRecord]]], info: TaskInfo) -> list[Row]:
    """Rows of the correlation over samples, of every method at each ratio, and over its ratios where it has several.

    A point is a sample: the share of its evidence's entries that are held (mean over layers and KV heads), and the
    mean score of its answers. Over ratios (``params.bin`` is ``ratios=0.3+0.5``), a point is a sample at one ratio, and
    all points of a sample are resampled together. Methods without survival have no rows.
    """
    known: dict[str, list[tuple[Cell, list[AnswerRecord]]]] = {}
    for cell, records in measured:
        chosen = [records[name] for name in info.documents]
        if cell.role != "control" and all(record.survival is not None for record in chosen):
            known.setdefault(cell.name, []).append((cell, chosen))
    rows = []
    for cells in known.values():
        rows += [_row(cell, _Points.of(records), info, None) for cell, records in cells]
        ratios = sorted({float(cell.ratio_asked) for cell, _ in cells if cell.ratio_asked is not None})
        if len(ratios) > 1:
            together = _Points.of([record for _, records in cells for record in records])
            rows.append(_row(replace(cells[0][0], ratio_asked=None), together, info, over_ratios(ratios)))
    return rows


def _row(cell: Cell, points: _Points, info: TaskInfo, bin_name: str | None) -> Row:
    return row(
        cell, CORRELATION, f"{info.signature}|{CORRELATION_SIGNATURE}", points.estimate(cell.seed), unit="point",
        n=len(points.scores), groups=len(set(points.groups)), params=settings(cell, info, bin_name),
        compression=Compression(1 - points.kept / points.raw if points.raw else None),
    )
