"""Output of ``--dry-run`` for commands that measure: cells, estimated time, and the run folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbench.execution.foreseen import Foreseen
    from kvbench.planning.quality import Plan
    from kvbench.store.records import Cell, Failure


def print_cells_as_json(path: Path, cells: Sequence[Cell], left_out: Sequence[tuple[Cell, Failure]] = ()) -> None:
    """Print the cells as one JSON document, and those that are left out with the reason, if any are."""
    content = {"schema": 1, "run": str(path), "dry_run": True, "cells": [_as_row(cell) for cell in cells]}
    if left_out:
        content["left_out"] = [
            {**_as_row(cell), "error": failure.error, "hint": failure.hint} for cell, failure in left_out
        ]
    sys.stdout.write(json.dumps(content) + "\n")


def _as_row(cell: Cell) -> dict[str, object]:
    return {"key": cell.key, **dataclasses.asdict(cell)}


def print_plans(plans: Sequence[Plan], path: Path, as_json: bool, skip_infeasible: bool) -> None:
    """Print the cells of plans, how many documents of each are on disk, and the estimated time for the rest.

    Args:
        skip_infeasible: whether cells that cannot be measured on the documents are left out.

    Raises:
        UserError: the documents are too short, or a method cannot be used on them.
    """
    from kvbench.execution.foreseen import foresee

    found = foresee(plans, skip_infeasible)
    cells = [cell for one in found for cell in one.cells]
    if as_json:
        all_cells = {cell.key: cell for plan in plans for cell in plan.cells}
        print_cells_as_json(path, cells, [(all_cells[why.cell], why) for one in found for why in one.left_out])
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
    for plan, one in zip(plans, found, strict=True):
        costs = estimate_seconds(plan, folder, one.documents)
        for cell in one.cells:
            cost = costs[cell.key]
            total, unknown = total + (cost or 0.0), unknown + (cost is None)
            table.add_row(
                cell.key, cell.model, cell.name, cell.ratio_asked or "-", str(cell.seed), cell.role, cell.workload,
                cell.protocol, str(one.documents.get(cell.workload, expected(plan, cell))),
                str(len(folder.documents(cell))), "?" if cost is None else duration_of(cost),
            )
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)
    for sentence in dict.fromkeys(_memory(plan) for plan in plans):
        console.print(sentence, highlight=False)
    for sentence in dict.fromkeys(filter(None, map(slow_dtype, plans))):
        console.print(sentence, highlight=False)
    for sentence in _left_out(plans, found):
        console.print(sentence, highlight=False, markup=False)
    later = list(dict.fromkeys(name for one in found for name in one.unknown))
    if later:
        console.print(
            f"Whether the texts of {', '.join(later)} are long enough, and for which methods, is checked when it runs.",
            highlight=False,
        )
    console.print(
        f"About {duration_of(total)} on this machine" + (f", and {unknown} cells of unknown cost" if unknown else "")
        + ": from the time that documents on disk took where there are any, from the model's size and a timed matrix "
        "product elsewhere, which is a rough guess.", highlight=False,
    )


def _left_out(plans: Sequence[Plan], found: Sequence[Foreseen]) -> list[str]:
    notes = [f"left out: {note}" for plan in plans for note in plan.omitted]
    return list(dict.fromkeys([*notes, *(failure.sentence for one in found for failure in one.left_out)]))


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
