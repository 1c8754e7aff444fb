"""``kvbench compare``: is there a difference between two measured cells?"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from kvbench.cli import options


def compare(
    first: Annotated[str, typer.Argument(
        parser=options.text, help="RUN, RUN:METHOD or RUN:METHOD:RATIO.", metavar="A")],
    second: Annotated[str, typer.Argument(
        parser=options.text, help="The same, of this or another run.", metavar="B")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Compare two runs, or two methods of a run: every metric, paired by document, with p-values.

    Without a method, cells of the same method and ratio are compared, or the only ones there are.
    What was not scored on the same documents in the same way is refused. Needs neither the model
    nor PyTorch.

    Examples:

      kvbench compare reports/sentinel-0.7-1a2b3c4d5e reports/sentinel-0.7-5e4d3c2b1a

      kvbench compare reports/sentinel-0.7-1a2b3c4d5e:local reports/sentinel-0.7-1a2b3c4d5e:sentinel
    """
    from rich.console import Console

    from kvbench.analysis.comparison import compare as compared
    from kvbench.analysis.comparison import parse_side
    from kvbench.reporting.tables.comparison import comparison_tables

    pairs = compared(parse_side(first), parse_side(second))
    if json_:
        import dataclasses

        rows = [
            {"first": pair.names[0], "second": pair.names[1], **dataclasses.asdict(row)}
            for pair in pairs for row in pair.rows
        ]
        sys.stdout.write(json.dumps({"schema": 1, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
        return
    console = Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=140)
    for table in comparison_tables(pairs):
        console.print(table)
