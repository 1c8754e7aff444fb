"""``kvbench import``: what other programs measured, as a run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli import options
from kvbench.cli.measure import command_line

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich",
    help="Make a run folder of what another program measured.\n\nExample: kvbench import kvpress results/ruler__* "
    "--out reports/kvpress",
)


@app.callback()
def _import() -> None:
    pass


@app.command("kvpress")
def kvpress(
    predictions: Annotated[list[Path], typer.Argument(
        parser=options.path, metavar="PREDICTIONS...",
        help="Files predictions.csv that kvpress' evaluate.py wrote, or the folders that they are in.")],
    out: Annotated[Path, typer.Option(
        parser=options.path, help="Run folder to write; files are added to one that was imported before.")],
    method: Annotated[str | None, typer.Option(
        parser=options.text, show_default=False, rich_help_panel="Where neither config.yaml nor the folder says it",
        help="The press, such as snapkv; no_press is the full cache.")] = None,
    ratio: Annotated[float | None, typer.Option(
        show_default=False, rich_help_panel="Where neither config.yaml nor the folder says it",
        help="Share that was to be removed, in [0, 1); 0 is the full cache.")] = None,
    model: Annotated[str | None, typer.Option(
        parser=options.text, show_default=False, rich_help_panel="Where neither config.yaml nor the folder says it",
        help="The model.")] = None,
    dataset: Annotated[str | None, typer.Option(
        parser=options.text, show_default=False, rich_help_panel="Where neither config.yaml nor the folder says it",
        help="The data set, with its part if there is one: ruler/4096.")] = None,
    context: Annotated[str | None, typer.Option(
        parser=options.text, show_default=False,
        help="Column that says which rows share a context, which kvpress leaves out of the file. \\[default: context "
        "if there is one; otherwise each row has its own]")] = None,
    json_: options.Json = False,
    wide: options.Wide = False,
) -> None:
    """Make a run folder of prediction files of NVIDIA's kvpress, and print its tables.

    Each file is one configuration. Press, ratio, model and data set are read from config.yaml
    beside it, or from the name of its folder. Answers are scored by the data set's published rule.
    Give the file of no_press as well: methods are compared with it. The result is reported and
    compared like any run; what the files do not say, such as bytes and entries, is a dash, and
    ratios are those that were asked for, which nobody has verified.

    Examples:

      kvbench import kvpress results/ruler__4096__* --out reports/kvpress

      kvbench compare reports/kvpress:snapkv:0.5 reports/kvpress:knorm:0.5

      kvbench import kvpress my.csv --method snapkv --ratio 0.5 --model Qwen/Qwen3-8B --dataset ruler/4096 --out run

    Exit codes: 0 all imported; 2 a file is refused, and nothing was written.
    """
    from rich.console import Console

    from kvbench.analysis.results import compute_results
    from kvbench.integrations.kvpress.importing import import_predictions
    from kvbench.integrations.kvpress.settings import Settings
    from kvbench.reporting.tables.terminal import print_results
    from kvbench.store.folder import RESULTS, RunFolder, write_atomic

    name, _, part = (dataset or "").partition("/")
    given = Settings(
        press_name=method, compression_ratio=ratio, model=model, dataset=name or None, data_dir=part or None
    )
    summary = import_predictions(predictions, out, given, context or "", command_line())
    for cell, source in summary.added:
        typer.echo(f"{cell.label}: {source}", err=True)
    for source in summary.present:
        typer.echo(f"already there: {source}", err=True)
    for remark in summary.remarks:
        typer.echo(remark, err=True)
    results = compute_results(RunFolder(out))
    write_atomic(out / RESULTS, results.to_json() + "\n")
    if json_:
        sys.stdout.write(results.to_json() + "\n")
    else:
        print_results(results, Console(), out, wide)
    raise typer.Exit(0 if results.ok else 1)
