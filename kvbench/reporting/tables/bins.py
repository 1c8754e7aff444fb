"""Tables of accuracy or perplexity by bin: distance, time step, depth of a needle, number of the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvbench.analysis.curves import is_of_curve
from kvbench.reporting.tables.format import asked_of, cells_of, entry_of, name_of
from kvbench.reporting.tables.plain import Table, TableCell
from kvbench.store.rows import Row

_LABELS = {
    "distance": "distance in tokens", "step": "time step (chunks in memory)", "depth": "depth of the needle in percent",
    "question": "number of the question about a context",
}
MOST, FEW = 10, 6
"""Bins that a table has at most, and at most if there is more than one table."""
_METRICS = {"ppl": "perplexity", "accuracy": "accuracy", "answer_accuracy": "accuracy"}


def bin_tables(rows: Sequence[Row], name: str, title: str = "") -> list[Table]:
    """Tables of one task, one for each metric and kind of bins.

    Args:
        name: of the task, for files; ``title``: what titles begin with.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in (row for row in rows if row.metric in _METRICS and row.params.get("bin") and not is_of_curve(row)):
        found.setdefault((row.metric, str(row.params["bin"]).partition("=")[0]), []).append(row)
    return [
        _table(mine, bins, metric, label, part, name, title) for (metric, label), mine in found.items()
        for part, bins in enumerate(_parts(list(dict.fromkeys(str(row.params["bin"]) for row in mine))))
    ]


def _parts(bins: list[str]) -> list[list[str]]:
    """Bins in as many tables as they need to be readable."""
    parts = 1 if len(bins) <= MOST else -(-len(bins) // FEW)
    size = -(-len(bins) // parts)
    return [bins[start : start + size] for start in range(0, len(bins), size)]


def _table(rows: list[Row], bins: list[str], metric: str, label: str, part: int, name: str, title: str) -> Table:
    lines = []
    for (method, ratio), metrics in cells_of(rows).items():
        mine = {
            row.params["bin"]: replace(row, p_value=None) for row in rows
            if (name_of(row), row.ratio_asked) == (method, ratio)
        }
        lines.append((
            TableCell(method, method), TableCell(asked_of(metrics[metric]), ratio),
            *(entry_of(mine.get(one)) for one in bins),
        ))
    return Table(
        f"{name}-{label}{f'-{part + 1}' if part else ''}",
        f"{title}{_METRICS[metric]} by {_LABELS.get(label, label)} [95 % CI]",
        ("method", "asked", *(one.partition("=")[2] for one in bins)), tuple(lines),
        (rows[0].signature.partition(":")[2],),
    )
