"""Results in a program: rows, a pandas frame, and the tables that the commands print."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.store.records import Failure
from kvbench.store.rows import Results, Row

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Evaluation:
    """What was measured into a run folder, with intervals and paired differences.

    ``print`` shows the tables of the command line.

    Attributes:
        folder: the run folder, which ``kvbench report`` and ``kvbench compare`` take.
    """

    folder: Path
    results: Results

    @property
    def rows(self) -> tuple[Row, ...]:
        """One number each; see docs/protocols.md for the fields."""
        return self.results.rows

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Why cells could not be finished, or were left out."""
        return self.results.failures

    @property
    def ok(self) -> bool:
        """Whether every cell is complete."""
        return self.results.ok

    def frame(self) -> pd.DataFrame:
        """The rows as a table: a column for each field, and ``bin`` and ``variant`` of the parameters."""
        import pandas as pd

        rows = [
            {**dataclasses.asdict(row), "bin": row.params.get("bin"), "variant": row.params.get("variant")}
            for row in self.rows
        ]
        return pd.DataFrame(rows, columns=[*(field.name for field in dataclasses.fields(Row)), "bin", "variant"])

    def __str__(self) -> str:
        from rich.console import Console

        from kvbench.reporting.tables.terminal import print_results

        text = StringIO()
        print_results(self.results, Console(file=text), self.folder)
        return text.getvalue()

    def _repr_html_(self) -> str:
        """The same tables for a notebook."""
        from rich.console import Console

        from kvbench.reporting.tables.compact import COMPACT_WIDTH
        from kvbench.reporting.tables.terminal import print_results

        console = Console(record=True, force_terminal=True, width=COMPACT_WIDTH, file=StringIO())
        print_results(self.results, console, self.folder)
        form = '<pre style="line-height:normal;font-family:monospace">{code}</pre>'
        return console.export_html(inline_styles=True, code_format=form)
