"""Writes a report: results.json, tables, figures, and one HTML page with all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kvbench.analysis.results import compute_results
from kvbench.errors import UserError
from kvbench.metrics import SHOWN
from kvbench.reporting.apart import told_apart
from kvbench.reporting.figures.base import removal_figure
from kvbench.reporting.figures.masks import mask_figure
from kvbench.reporting.figures.needles import needle_figures
from kvbench.reporting.figures.profile import profile_figures
from kvbench.reporting.figures.quality import (
    asked_figures,
    distance_figure,
    memory_figure,
    pareto_figure,
    position_figure,
)
from kvbench.reporting.figures.questions import question_figures
from kvbench.reporting.figures.recall import recall_figure
from kvbench.reporting.page.page import write_page
from kvbench.reporting.parallel import in_parallel
from kvbench.reporting.tables.export import write_tables
from kvbench.reporting.tables.format import name_of, task_of
from kvbench.store.folder import RESULTS, RunFolder, write_atomic
from kvbench.store.rows import Results, Row

DRAWN = tuple(name for name, shown in SHOWN.items() if shown.is_plotted)
"""Metrics that are drawn against removal by default."""


@dataclass(frozen=True)
class Report:
    """The results of a report, and the files that were written."""

    results: Results
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]
    page: Path


def write_report(runs: Sequence[Path], out: Path, metrics: Sequence[str] = ()) -> Report:
    """Write the report of one or several runs into a folder.

    Args:
        metrics: metrics to draw against removal; ``DRAWN`` if empty.

    Raises:
        UserError: a run is not a run folder, budgets differ, or the output folder cannot be written.
    """
    folders = [RunFolder(run) for run in runs]
    found = [compute_results(folder) for folder in folders]
    by_run = told_apart(folders, found)
    rows = [row for mine in by_run for row in mine]
    _check_budgets(rows)
    _check_signatures(rows)
    failures = tuple(failure for results in found for failure in results.failures)
    results = Results(str(out), all(each.ok for each in found), failures, tuple(rows))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / RESULTS, results.to_json() + "\n")
        figures = write_figures(folders, rows, out / "figures", metrics)
        tables = write_tables(rows, out / "tables")
        page = write_page(list(zip(folders, by_run, strict=True)), failures, out)
    except OSError as error:
        raise UserError(f"The folder {out} cannot be written: {error.strerror}.") from error
    return Report(results, tuple(figures), tuple(tables), page)


def _check_budgets(rows: Sequence[Row]) -> None:
    """Check that all rows have the same budget, since tables have one line per method and ratio.

    Raises:
        UserError: there are several budgets.
    """
    units = ("budget_tokens", "budget_bytes")
    budgets = {f"{unit}={row.params[unit]}" for row in rows for unit in units if row.params.get(unit)}
    if len(budgets) > 1:
        shown = ", ".join(sorted(budgets))
        raise UserError(
            f"These runs were measured at {len(budgets)} budgets ({shown}), and a table holds one.",
            "Report them one by one.",
        )


def _check_signatures(rows: Sequence[Row]) -> None:
    """Check that rows of one table were taken alike: with other settings, one would stand for the other.

    Raises:
        UserError: they were not.
    """
    found: dict[tuple[object, ...], str] = {}
    for row in rows:
        where = (task_of(row), row.protocol, row.model, row.seed, row.metric, row.params.get("bin"))
        key = (*where, name_of(row), row.ratio_asked)
        mine = row.signature
        other = found.setdefault(key, mine)
        if other != mine and row.protocol != "profile":
            differing = " against ".join(
                "|".join(part for part in one.split("|") if part not in two.split("|"))
                for one, two in ((other, mine), (mine, other))
            )
            raise UserError(
                f"These runs of {task_of(row)} were taken in different ways ({differing}), and a table holds one.",
                "Report them one by one.",
            )


def write_figures(
    folders: Sequence[RunFolder], rows: list[Row], out: Path, metrics: Sequence[str] = ()
) -> list[Path]:
    """Draw all figures that there are numbers for."""
    rows = [replace(row, method=name_of(row), params={**row.params, "variant": None}) for row in rows]
    masks = {name: mask for folder in folders for name, mask in folder.masks().items()}
    tasks: list[Callable[[], list[Path]]] = [
        *(partial(removal_figure, rows, name, out, SHOWN[name].axis) for name in metrics or DRAWN),
        *(partial(draw, rows, out) for draw in (
            pareto_figure, asked_figures, position_figure, distance_figure, recall_figure, memory_figure,
            profile_figures, needle_figures, question_figures,
        )),
        partial(mask_figure, masks, _to_show(list(masks)), out),
    ]
    # In parallel, since embedding fonts into every PDF takes longest and uses one thread.
    return [path for paths in in_parallel(tasks) for path in paths]


def _to_show(names: list[str]) -> list[str]:
    """Names of the masks to draw: every method once, at the ratio nearest to 0.7."""
    best: dict[str, tuple[float, str]] = {}
    for name in names:
        method, _, ratio = name.partition(" ")
        far = abs(float(ratio) - 0.7) if ratio else 0.0
        if method not in best or far < best[method][0]:
            best[method] = (far, name)
    return [name for _, name in best.values()]
