"""What has been found while a run goes on, for its progress display; results are computed from what is on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from kvbench.store.answer_records import AnswerRecord
from kvbench.store.records import Cell, DocumentRecord

_OTHERS = 4
"""Cells that are shown beside the full cache: those measured last."""


@dataclass
class _Sums:
    cell: Cell
    documents: int = 0
    value: float = 0.0
    weight: float = 0.0


class SoFar:
    """Running values of the cells of a run: perplexity, accuracy, or the number of texts."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def add(self, cell: Cell, records: Sequence[object]) -> None:
        sums = self._sums.pop(cell.key, _Sums(cell))
        self._sums[cell.key] = sums  # the cell measured last is the last
        for record in records:
            value, weight = _of(record)
            sums.documents, sums.value, sums.weight = sums.documents + 1, sums.value + value, sums.weight + weight

    def line(self, cell: Cell) -> str:
        """The values of a cell's setting so far: the full cache's, and those of the cells measured last."""
        mine = [sums for sums in self._sums.values() if sums.cell.setting == cell.setting]
        full = [sums for sums in mine if sums.cell.name == "full"]
        shown = full + [sums for sums in mine if sums.cell.name != "full"][-_OTHERS:]
        values = ", ".join(f"{_name(sums.cell)} {_value(sums)}" for sums in shown)
        return f"so far, {cell.workload}: {values}"


def _of(record: object) -> tuple[float, float]:
    """The sum that a record adds, and its weight."""
    match record:
        case DocumentRecord():
            return record.nll, record.tokens
        case AnswerRecord():
            return record.score, 1.0
    return 0.0, 0.0


def _name(cell: Cell) -> str:
    return cell.name if cell.ratio_asked is None else f"{cell.name} {cell.ratio_asked}"


def _value(sums: _Sums) -> str:
    count = f"({sums.documents})"
    if not sums.weight:
        return count
    mean = sums.value / sums.weight
    return f"{mean:.2f} {count}" if sums.cell.answers else f"{math.exp(min(mean, 99.0)):.2f} {count}"


class Display(Progress):
    """The progress of a run: cell, share, documents, remaining time, and below it what has been found so far."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
            TextColumn("{task.fields[documents]}"), TimeRemainingColumn(), console=console, transient=True,
        )

    found: str = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.found:
            yield Text(self.found, style="dim", no_wrap=True, overflow="ellipsis")
