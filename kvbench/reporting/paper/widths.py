"""How wide a table is in print, from the letters in it: LaTeX is not needed to choose between a column and a page."""

from __future__ import annotations

from kvbench.reporting.tables.plain import Table, TableCell

COLUMN, PAGE = 8 * 72.27 / 2.54, 17 * 72.27 / 2.54
"""Widths in points: of a column, and of a page of two."""
GAP = 3
"""Points on either side of a column inside a table, which sets them, since they are wider by default."""
_WIDTHS = {
    " .,:;'|![]il": 2.4, "fjI()-trs": 3.35, "cez": 3.8, "0123456789ago/*": 4.25, "bdhknpquvxySJ": 4.75, "FLZ": 5.5,
    "BCEPTRw": 6.2, "±ADHKNUVXYGOQ+<>=": 6.7, "mM": 7.6, "W%@": 8.8,
}
"""Points of a letter of Computer Modern at 8 points (``\\footnotesize``); of Times it is narrower."""
_LETTERS = {letter: width for letters, width in _WIDTHS.items() for letter in letters}
_OTHER = 6.7
_BOLD = 1.155


def is_wide(table: Table) -> bool:
    """Whether a table takes both columns of a page."""
    return width_of(table) > COLUMN


def width_of(table: Table) -> float:
    """The width of a table in points, to a few per cent."""
    heads = [max(map(_width, column.split("\n"))) for column in table.columns]
    lines = [[_width_of_cell(cell) for cell in row] for row in table.rows]
    columns: list[float] = [max(column) for column in zip(heads, *lines, strict=True)]
    return sum(columns) + 2 * GAP * (len(columns) - 1)  # no gap at either end


def _width_of_cell(cell: TableCell) -> float:
    return _width(cell.text) * (_BOLD if cell.is_best else 1)


def _width(text: str) -> float:
    return sum(_LETTERS.get(letter, _OTHER) for letter in text)
