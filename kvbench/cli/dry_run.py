"""Output of ``--dry-run`` for commands that measure: cells, estimated time, and the run folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbench.planning.quality import Plan


def print_cells_as_json(path: Path, cells: Sequence[object]) -> None:
    """Print the cells as one JSON document."""
    rows = [{"key": cell.key, **dataclasses.asdict(cell)} for cell in cells]  # type: ignore[attr-defined, call-overload]
    sys.stdout.write(json.dumps({"schema": 1, "run": str(path), "dry_run": True, "cells": rows}) + "\n")


def print_plans(plans: Sequence[Plan], path: Path, as_json: bool) -> None:
    """Print the cells of plans, how many documents of each are on disk, and the estimated time for the rest."""
    cells = [cell for plan in plans for cell in plan.cells]
    if as_json:
        print_cells_as_json(path, cells)
        return
    from rich.console import Console
    from rich.table import Table

    from kvbench.execution.estimate import estimate_seconds, expected, slow_dtype
    from kvbench.parsing import duration_of
    from kvbench.reporting.tables.format import WIDTH
    from kvbench.store.folder import RunFolder

    folder = RunFolder(path)
    table = Table(title=f"{len(cells)} cells -> {path}")
    for column in ("cell", "model", "method", "ratio", "seed", "role", "task", "protocol", "documents", "on disk",
                   "takes about"):
        table.add_column(column)
    total, unknown = 0.0, 0
    for plan in plans:
        costs = estimate_seconds(plan, folder)
        for cell in plan.cells:
            cost = costs[cell.key]
            total, unknown = total + (cost or 0.0), unknown + (cost is None)
            table.add_row(
                cell.key, cell.model, cell.name, cell.ratio_asked or "-", str(cell.seed), cell.role, cell.workload,
                cell.protocol, str(expected(plan, cell)), str(len(folder.documents(cell))),
                "?" if cost is None else duration_of(cost),
            )
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)
    for sentence in dict.fromkeys(_memory(plan) for plan in plans):
        console.print(sentence, highlight=False)
    for sentence in dict.fromkeys(filter(None, map(slow_dtype, plans))):
        console.print(sentence, highlight=False)
    for note in dict.fromkeys(note for plan in plans for note in plan.omitted):
        console.print(f"left out: {note}", highlight=False)
    console.print(
        f"About {duration_of(total)} on this machine" + (f", and {unknown} cells of unknown cost" if unknown else "")
        + ": from the time that documents on disk took where there are any, from the model's size and a timed matrix "
        "product elsewhere, which is a rough guess.", highlight=False,
    )


def _memory(plan: Plan) -> str:
    """Whether weights, cache and peak fit the memory of the machine."""
    import psutil

    from kvbench.execution.estimate import estimate_memory
    from kvbench.parsing import bytes_of

    found = estimate_memory(plan)
    if found is None:
        return f"Memory: the size of {plan.model.name} is known only once it is here."
    free, needed = psutil.virtual_memory().available, found.peak * found.processes
    each = "" if found.processes == 1 else f", {found.processes} of them"
    return (
        f"Memory of {plan.model.name}: weights {bytes_of(found.weights)}, full cache of the longest text "
        f"{bytes_of(found.cache)}, a process about {bytes_of(found.peak)} at its peak{each}; "
        f"{bytes_of(free)} are free{'' if needed < free else ': it may NOT FIT'}."
    )
