"""Table of the correlation between the share of evidence that is held and the score, by method and ratio."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.analysis.rows import is_over_ratios
from kvbench.metrics.answers import CORRELATION
from kvbench.reporting.tables.format import asked_of, entry_of, name_of
from kvbench.reporting.tables.plain import Table, TableCell
from kvbench.store.rows import Row

_OVER = "over ratios"


def survival_tables(rows: Sequence[Row], name: str, title: str = "") -> list[Table]:
    """The table of one task, with a column for each ratio; none where no correlation is defined.

    Args:
        name: of the task, for files; ``title``: what the title begins with.
    """
    mine = [row for row in rows if row.metric == CORRELATION]
    if all(row.value is None for row in mine):
        return []
    ratios = sorted((row for row in mine if not is_over_ratios(row)), key=lambda row: row.ratio_asked or 0.0)
    columns = list(dict.fromkeys(asked_of(row) for row in ratios))
    columns += [_OVER] if any(map(is_over_ratios, mine)) else []
    found: dict[str, dict[str, Row]] = {}
    for row in mine:
        found.setdefault(name_of(row), {})[_OVER if is_over_ratios(row) else asked_of(row)] = row
    return [Table(
        f"{name}-survival", f"{title}correlation of evidence held and score, by ratio [95 % CI]", ("method", *columns),
        tuple(
            (TableCell(method, method), *(entry_of(cells.get(column)) for column in columns))
            for method, cells in found.items()
        ),
        (
            f"Spearman over the {mine[0].groups} samples of a method at a ratio: share of the evidence's entries held "
            "(mean over layers and heads), and mean score of the answers. Over ratios: each sample at each ratio is a "
            "point; samples are resampled with all their points. -: not defined, where one of the two is the same for "
            "all; no interval: not defined in more than 5 % of the resamples.",
        ),
    )]
