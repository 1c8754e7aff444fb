"""``kvbench report``: tables and figures of a run, from disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

_LABELS = {"ppl": "perplexity", "accuracy": "recall accuracy", "kl": "KL from the full cache (nats per token)",
           "gen_ppl": "perplexity of the written text"}


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, as 'kvbench run' named it.", metavar="RUN")],
    metric: Annotated[list[str] | None, typer.Option(
        help="Metric to draw against removal; repeatable. [default: ppl, accuracy, gen_ppl]",
        show_default=False)] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the JSON document on stdout.")] = False,
) -> None:
    """Print the table of a run again and draw its figures, from what is on disk.

    Needs neither the model nor PyTorch. Writes results.json, table.txt, tables/ (Markdown, CSV,
    LaTeX), figures/ (PNG and PDF) and report.html, one page with everything, into the run folder.

    Example: kvbench report reports/sentinel-0.7-1a2b3c4d5e
    """
    from rich.console import Console

    from kvbench.errors import UserError, unknown
    from kvbench.metrics import METRIC_NAMES
    from kvbench.reporting.curves import asked_figures, distance_figure, memory_figure
    from kvbench.reporting.export import write_tables
    from kvbench.reporting.figures import removal_figure
    from kvbench.reporting.page import write_page
    from kvbench.reporting.profile_figures import profile_figures
    from kvbench.reporting.results import compute_results
    from kvbench.reporting.tables import print_results
    from kvbench.store.folder import RESULTS, RunFolder, write_atomic

    for name in metric or ():
        if name not in METRIC_NAMES:
            raise unknown("metric", name, METRIC_NAMES)
    folder = RunFolder(run)
    results = compute_results(folder)
    rows = list(results.rows)
    try:
        write_atomic(run / RESULTS, results.to_json() + "\n")
        with (run / "table.txt").open("w", encoding="utf-8") as file:
            print_results(results, Console(file=file), run)
        figures = [
            path for name in metric or ("ppl", "accuracy", "gen_ppl")
            for path in removal_figure(rows, name, run / "figures", _LABELS.get(name, name))
        ]
        for draw in (asked_figures, memory_figure, distance_figure, profile_figures):
            figures += draw(rows, run / "figures")
        tables = write_tables(rows, run / "tables")
        page = write_page(folder, results, figures)
    except OSError as error:
        raise UserError(f"The run folder {run} cannot be written: {error.strerror}.") from error
    if json_:
        sys.stdout.write(results.to_json() + "\n")
    else:
        console = Console()
        print_results(results, console, run)
        for path in figures:
            console.print(f"figure: {path}", soft_wrap=True, highlight=False)
        console.print(f"tables: {len(tables)} files in {run / 'tables'}", soft_wrap=True, highlight=False)
        console.print(f"page: {page}", soft_wrap=True, highlight=False)
    raise typer.Exit(0 if results.ok else 1)
