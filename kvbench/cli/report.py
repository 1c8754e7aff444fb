"""``kvbench report``: tables, figures and a page of runs, from disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli import completion, options


def report(
    run: Annotated[list[Path], typer.Argument(
        parser=options.path,
        help="Run folders, as 'kvbench run', 'sweep' and 'profile' named them.", metavar="RUN...")],
    metric: Annotated[list[str] | None, typer.Option(
        autocompletion=completion.metric,
        help="Metric to draw against removal; repeatable. \\[default: ppl, accuracy, and four of written text]",
        show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(
        parser=options.path,
        help="Folder to write into; needed for several runs. \\[default: the run folder]", show_default=False)] = None,
    paper: Annotated[bool, typer.Option(
        "--paper", help="Write paper/ as well: figures at column width, LaTeX tables, BibTeX, the set-up.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the JSON document on stdout.")] = False,
    wide: options.Wide = False,
    bundle: Annotated[bool, typer.Option(
        "--bundle", help="Only write the run as one file for others, NAME.zip, without texts and paths.")] = False,
) -> None:
    """Print the tables of runs again and draw their figures, from what is on disk.

    Needs neither the model nor PyTorch. Writes results.json, table.txt, tables/ (Markdown, CSV,
    LaTeX), figures/ (PNG and PDF) and report.html, one page with everything; with --paper also paper/.

    --bundle writes one archive instead, to give to others: unpacked, it is reported and compared
    with the same numbers. No text, token or path is in it; ids of documents are.

    Examples:

      kvbench report reports/sentinel-0.7-1a2b3c4d5e

      kvbench report reports/sentinel-0.7-1a2b3c4d5e --bundle

      kvbench report reports/sweep-minidocs-1a2b3c4d5e reports/profile-5e4d3c2b1a --out paper
    """
    from rich.console import Console

    from kvbench.errors import UserError, unknown
    from kvbench.metrics import METRIC_NAMES, OTHER_NAMES
    from kvbench.reporting.bundle import bundle_notes, print_bundle
    from kvbench.reporting.paper.paper import write_paper
    from kvbench.reporting.report import write_report
    from kvbench.reporting.tables.terminal import print_results
    from kvbench.store.folder import RUN

    if bundle:
        print_bundle(run, out, Console())
        return
    for name in metric or ():
        if name not in METRIC_NAMES:
            raise unknown("metric", name, METRIC_NAMES, OTHER_NAMES)
    if out is None and len(run) > 1:
        raise UserError(f"A report of {len(run)} runs needs a folder of its own.", "Name one with --out.")
    if out is not None and (out / RUN).exists() and out.resolve() not in [path.resolve() for path in run]:
        raise UserError(f"The folder {out} holds another run.", "Choose another --out.")
    folder = out or run[0]
    found = write_report(run, folder, metric or ())
    included = write_paper(run, found.results, folder, metric or ()) if paper else None
    try:
        with (folder / "table.txt").open("w", encoding="utf-8", errors="backslashreplace") as file:
            print_results(found.results, Console(file=file), folder, wide=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error
    if json_:
        sys.stdout.write(found.results.to_json() + "\n")
    else:
        console = Console()
        print_results(found.results, console, folder, wide)
        for path in found.figures:
            console.print(f"figure: {path}", soft_wrap=True, highlight=False)
        console.print(f"tables: {len(found.tables)} files in {folder / 'tables'}", soft_wrap=True, highlight=False)
        console.print(f"page: {found.page}", soft_wrap=True, highlight=False)
        if included is not None:
            for path in included.figures:
                console.print(f"paper figure: {path}", soft_wrap=True, highlight=False)
            tables = f"{len(included.tables)} files in {folder / 'paper' / 'tables'}"
            console.print(f"paper tables: {tables}", soft_wrap=True, highlight=False)
            console.print(f"paper: {included.document}", soft_wrap=True, highlight=False)
        for note in bundle_notes(run):
            console.print(note, highlight=False, markup=False)
    raise typer.Exit(0 if found.results.ok else 1)
