"""Writes tables to files: each as Markdown, CSV and LaTeX, and all rows as one CSV."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kvbench.reporting.tables.latex import latex
from kvbench.reporting.tables.plain import Table
from kvbench.reporting.tables.tables import renamed, tables_of
from kvbench.store.folder import write_atomic
from kvbench.store.rows import Row


def write_tables(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write every table in each of the formats.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found, taken = [], set[str]()
    for table in tables_of(rows):
        named = renamed(table, taken)
        taken.add(named.name)
        for ending, text in (("md", markdown(named)), ("tex", latex(named)), ("csv", csv(named))):
            path = folder / f"{named.name}.{ending}"
            write_atomic(path, text)
            found.append(path)
    path = folder / "rows.csv"
    write_atomic(path, all_rows(rows))
    return [*found, path]


def markdown(table: Table) -> str:
    """Format a table as GitHub-flavoured Markdown, with its notes."""
    body = [
        [f"**{_md(entry.text)}**" if entry.is_best else _md(entry.text) for entry in row] for row in table.rows
    ]
    frame = pd.DataFrame(body, columns=_unique(table.columns))
    text = frame.to_markdown(index=False, disable_numparse=True)
    notes = "\n\n".join(_md(note) for note in table.notes)
    return f"**{_md(table.title)}**\n\n{text}\n\n{notes}\n"


def _md(text: str) -> str:
    return text.replace("*", r"\*").replace("_", r"\_").replace("|", r"\|")


def csv(table: Table) -> str:
    """Format a table as CSV, with the text of every cell."""
    body = [[entry.text for entry in row] for row in table.rows]
    text: str = pd.DataFrame(body, columns=_unique(table.columns)).to_csv(index=False)
    return text


def all_rows(rows: Sequence[Row]) -> str:
    """Format all rows with all their fields as CSV; parameters are one column of JSON."""
    frame = pd.DataFrame([dataclasses.asdict(row) | {"params": json.dumps(row.params)} for row in rows])
    text: str = frame.to_csv(index=False)
    return text


def _unique(columns: Sequence[str]) -> list[str]:
    """Make headings unique by appending the column's index to repeated ones."""
    return [f"{column} {i}" if column in columns[:i] else column for i, column in enumerate(columns)]
