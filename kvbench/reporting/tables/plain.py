"""A table as plain data, from which those of terminal, files and page are made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TableCell:
    """One cell of a table.

    Attributes:
        sort: key to sort by; None sorts last.
        is_best: whether it is the best at its ratio, with an interval that does not overlap the next one.
    """

    text: str
    sort: float | str | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its title, its notes, and a name for files.

    Attributes:
        columns: headings.
        rows: one cell per column each.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    notes: tuple[str, ...]
