"""What came out, on disk after every step: results.json and table.txt, each whole at any moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import Cell, Found

RESULTS, TABLE = "results.json", "table.txt"

OK, WRONG, FAILED, CUT, SKIPPED, RUNNING, WAITING = (
    "ok", "WRONG", "FAILED", "cut short", "skipped", "running", "waiting",
)
ENDED = (OK, SKIPPED)
"""What is no reason to leave with 1."""


@dataclass
class Outcome:
    """Of a cell; that of one which has not ended says so, in case the run ends first.

    Attributes:
        trace: the traceback, where something was raised.
    """

    cell: Cell
    status: str = WAITING
    why: str = "The run ended before this cell was reached."
    found: Found = field(default_factory=Found)
    seconds: float = 0.0
    trace: str = ""

    @property
    def says(self) -> str:
        return " ".join(part for part in (self.found.says, self.why) if part)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "group": self.cell.group, "name": self.cell.name, "limit_s": self.cell.limit, "status": self.status,
            "says": self.says, "seconds": round(self.seconds, 3),
            "numbers": {name: number.plain() for name, number in self.found.numbers.items()},
            "trace": self.trace.splitlines(),
        }

    def line(self) -> str:
        """For people."""
        numbers = ", ".join(f"{name} {number}" for name, number in self.found.numbers.items())
        tail = "; ".join(part for part in (numbers, self.says) if part)
        return f"{self.status:9s}  {self.cell.group}: {self.cell.name}  ({self.seconds:.1f} s)  {tail}"


class Report:
    """Outcomes of all planned cells, and the folder that they are in.

    Args:
        about: the machine, versions, settings.
    """

    def __init__(self, folder: Path, about: dict[str, Any], cells: Sequence[Cell]) -> None:
        self.folder, self.about = folder, about
        self.outcomes = [Outcome(cell) for cell in cells]
        self.ended = ""
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def is_right(self) -> bool:
        """Whether every cell held, or could not be had here."""
        return all(outcome.status in ENDED for outcome in self.outcomes)

    def write(self) -> None:
        """Both files, whole or as they were."""
        from kvbench.store.folder import write_atomic

        # A line for each cell: what is indented is written by Python itself, slower than many a cell is.
        head = json.dumps({"schema": 1, **self.about, "ended": self.ended}, allow_nan=False)
        cells = ",\n".join(json.dumps(outcome.plain(), allow_nan=False) for outcome in self.outcomes)
        write_atomic(self.folder / RESULTS, f'{head[:-1]}, "cells": [\n{cells}\n]}}\n')
        write_atomic(self.folder / TABLE, self.table())

    def table(self) -> str:
        """A grid per group of cells: those with numbers, then what the others say."""
        lines = [self.about.get("title", ""), self.ended or "The run has not ended, or was killed.", ""]
        for group in dict.fromkeys(outcome.cell.group for outcome in self.outcomes):
            lines += [group, *_grid([o for o in self.outcomes if o.cell.group == group]), ""]
        return "\n".join(lines)


def _grid(outcomes: Sequence[Outcome]) -> list[str]:
    columns = list(dict.fromkeys(name for o in outcomes for name in o.found.numbers))
    rows = [["", "", *columns, ""]] if columns else []
    for o in outcomes:
        numbers = [str(o.found.numbers.get(name, "-")) for name in columns]
        rows.append([o.status, o.cell.name, *numbers, o.says])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
