"""Table of the largest ratio without significant loss, by method."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.analysis.largest_ratio import FOUND, NONE
from kvbench.metrics import SHOWN
from kvbench.metrics.largest_ratio import LARGEST_RATIO
from kvbench.reporting.tables.format import delta_of, name_of, number_of
from kvbench.reporting.tables.plain import Table, TableCell
from kvbench.statistics import SIGNIFICANT
from kvbench.store.rows import Row

_NOTE = (
    "The largest of these ratios such that neither it nor a smaller one is significantly worse than full (paired, "
    f"Holm-adjusted p < {SIGNIFICANT}). That is no proof that nothing is lost: see the interval."
)
_FEW = (
    "Too few differ: ratio (d of all groups of {unit}s differ from full). No p is below 2^(1-d) then, and Holm's "
    "correction makes it larger: with few of them nothing can be significant, and no claim is made."
)


def largest_ratio_tables(rows: Sequence[Row], name: str, title: str = "") -> list[Table]:
    """The tables of one task: one for each metric that losses are judged by; none for runs with one ratio.

    Args:
        name: of the task, for files; ``title``: what titles begin with.
    """
    mine = [row for row in rows if row.metric == LARGEST_RATIO]
    return [
        _table([row for row in mine if row.params["of"] == metric], metric, name, title)
        for metric in dict.fromkeys(row.params["of"] for row in mine)
    ]


def _table(rows: Sequence[Row], metric: str, name: str, title: str) -> Table:
    lines, more = [], SHOWN[metric].digits - SHOWN[LARGEST_RATIO].digits
    for row in rows:
        ratios = str(row.params["bin"]).partition("=")[2].split("+")
        lines.append((
            TableCell(name_of(row), name_of(row)), TableCell(", ".join(ratios), float(ratios[-1])),
            TableCell(_found(row), row.value), TableCell(delta_of(row, more).replace("\n", " "), row.delta),
            TableCell(number_of(row.params["loses_at"], None), row.params["loses_at"]),
            TableCell(_untested(row)),
        ))
    return Table(
        f"{name}-largest-ratio", f"{title}largest ratio without significant loss ({SHOWN[metric].heading})",
        ("method", "ratios", "largest", "difference there", "loses at", "too few differ"), tuple(lines),
        (_NOTE, *([_FEW.format(unit=rows[0].unit)] if any(row.params["untested"] for row in rows) else ())),
    )


def _found(row: Row) -> str:
    if row.params["outcome"] == FOUND:
        return number_of(row.value, None)
    return "none" if row.params["outcome"] == NONE else "too few samples to test"


def _untested(row: Row) -> str:
    return ", ".join(f"{ratio} ({d} of {n})" for ratio, (d, n) in row.params["untested"].items()) or "-"
