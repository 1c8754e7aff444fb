"""``kvbench run``: quality of compressed models, in one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli import options
from kvbench.cli.measured import measured, print_cells_as_json

if TYPE_CHECKING:
    from kvbench.plan import Plan

_WHAT, _HOW, _TEXTS, _OUT = "What to run", "How to run", "Judging written text", "Output"


def run(
    method: Annotated[list[str] | None, typer.Option(
        help="Compression method; repeatable. [default: sentinel]", rich_help_panel=_WHAT)] = None,
    ratio: Annotated[list[str] | None, typer.Option(
        help="Share of cache entries to remove, in [0, 1): 0.7 keeps 30 %; repeatable. [default: 0.7]",
        rich_help_panel=_WHAT)] = None,
    task: Annotated[list[str] | None, typer.Option(
        help="Task, or a task file of your own; repeatable. [default: minidocs, recall and minidocs-gen]",
        rich_help_panel=_WHAT)] = None,
    data: Annotated[Path | None, typer.Option(
        help="Your own corpus for the task: .jsonl (rows with \"text\"), .txt, or either with .gz.",
        rich_help_panel=_WHAT)] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter: Annotated[list[str] | None, typer.Option(
        help="Adapter folder of a trained method; repeatable. [default: those shipped for kvbench-tiny]",
        show_default=False, rich_help_panel=_WHAT)] = None,
    protocol: Annotated[str | None, typer.Option(
        help="block, stream, prefix, online or generate. [default: the task's own]", rich_help_panel=_HOW)] = None,
    execution: Annotated[str, typer.Option(
        help="streamed (entries really removed) or onepass (masked, nothing freed).",
        rich_help_panel=_HOW)] = "streamed",
    limit: Annotated[int | None, typer.Option(
        help="Documents per task. [default: all]", show_default=False, rich_help_panel=_HOW)] = None,
    scorer: Annotated[str | None, typer.Option(
        help="Language model that gen_ppl is measured with: hub id or folder. [default: the uncompressed model]",
        show_default=False, rich_help_panel=_TEXTS)] = None,
    mauve_features: Annotated[str | None, typer.Option(
        help="What MAUVE compares: last states of this causal language model, such as gpt2-large. "
        "[default: sentence embeddings]", show_default=False, rich_help_panel=_TEXTS)] = None,
    metric: Annotated[list[str] | None, typer.Option(
        help="Metric of written text to measure, such as chrf; repeatable. [default: all; mauve from 200 documents "
        "on]", show_default=False, rich_help_panel=_TEXTS)] = None,
    seed: options.Seed = None,
    set_: options.Set = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    baselines: Annotated[bool, typer.Option(
        "--baselines/--no-baselines", help="Add none, local, scattered and sinks beside full.",
        rich_help_panel=_HOW)] = True,
    out: Annotated[Path | None, typer.Option(
        help="Run folder: missing, empty, or one of the same run. [default: reports/...]",
        show_default=False, rich_help_panel=_OUT)] = None,
    fresh: Annotated[bool, typer.Option(
        "--fresh", help="Measure again what is already there.", rich_help_panel=_OUT)] = False,
    json_: Annotated[bool, typer.Option(
        "--json", help="Print one JSON document on stdout instead of tables.",
        rich_help_panel=_OUT)] = False,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Print the cells and the folder; measure nothing.",
        rich_help_panel=_OUT)] = False,
    config: Annotated[Path | None, typer.Option(
        help="Settings file. [default: ./kvbench.toml if there is one]", show_default=False,
        rich_help_panel=_OUT)] = None,
) -> None:
    """Measure the quality of compressed models against the full cache and honest baselines.

    Each method is scored on the same text with cache entries [bold]really removed[/]; the table shows
    values with 95 % intervals, paired differences to the full cache, and the ratio that was
    realised. The same command continues an interrupted run and prints a finished one again.

    Examples:

      kvbench run --method sentinel --ratio 0.7

      kvbench run --method sinks --ratio 0.5 --ratio 0.9 --task books --data mybooks.jsonl.gz

      kvbench run --model Qwen/Qwen3-0.6B --method local --task wikitext2 --limit 20

      kvbench run --task minidocs-gen --method sentinel --scorer gpt2-large

    Exit codes: 0 all done; 1 a cell failed, the others are complete; 2 the request was wrong and
    nothing was written; 130 interrupted, what was measured is kept.
    """
    from rich.console import Console

    from kvbench.config import load_settings
    from kvbench.execution.runner import Conduct, execute
    from kvbench.execution.similarity import measure_similarity
    from kvbench.plan import Request, build_plan, parse_options
    from kvbench.store.folder import RunFolder

    console = Console(stderr=True)
    settings = load_settings(config).run
    request = Request(
        model=model or settings.model, revision=revision, adapters=tuple(adapter or ()),
        methods=tuple(method or settings.method),
        ratios=tuple(ratio or (f"{r:.10g}" for r in settings.ratio)),
        tasks=tuple(task or settings.task), data=data, protocol=protocol, execution=execution,
        limit=_checked_limit(limit, settings.limit), seed=_seed(seed, settings.seed),
        options=parse_options(set_ or []), out=out, reports=Path(settings.out), baselines=baselines,
        device=_device(device or settings.device), dtype=options.checked_dtype(dtype or settings.dtype),
        threads=options.checked_threads(threads, settings.threads), scorer=scorer, mauve_features=mauve_features,
        metrics=tuple(dict.fromkeys(metric or ())),
    )
    plan = build_plan(request)
    if dry_run:
        _print_plan(plan, json_)
        return

    def measure() -> None:
        execute([plan], plan.folder, plan.content, sys.argv, console, Conduct(fresh=fresh))
        measure_similarity(RunFolder(plan.folder), console)

    results = measured(plan.folder, plan.content, request.limit, fresh, console, measure, request.metrics)
    if json_:
        sys.stdout.write(results.to_json() + "\n")
    else:
        from kvbench.reporting.tables import print_results

        print_results(results, Console(), plan.folder)
    raise typer.Exit(0 if results.ok else 1)


def _print_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        print_cells_as_json(plan.folder, plan.cells)
        return
    from rich.console import Console
    from rich.table import Table

    from kvbench.store.folder import RunFolder

    folder = RunFolder(plan.folder)
    table = Table(title=f"{len(plan.cells)} cells -> {plan.folder}")
    for column in ("cell", "method", "ratio", "role", "task", "protocol", "documents", "on disk"):
        table.add_column(column)
    for cell in plan.cells:
        corpus = plan.corpora[cell.task]
        limit = plan.request.limit or len(corpus.documents)
        table.add_row(
            cell.key, cell.method, cell.ratio_asked or "-", cell.role, cell.task, cell.protocol,
            str(min(limit, len(corpus.documents))), str(len(folder.documents(cell))),
        )
    Console().print(table)


def _checked_limit(given: int | None, default: int) -> int:
    from kvbench.errors import UserError

    if given is not None and given < 1:
        raise UserError(f"--limit {given} is below 1.", "It is the number of documents per task.")
    return default if given is None else given


def _seed(given: int | None, default: int) -> int:
    from kvbench.errors import UserError

    if given is not None and given < 0:
        raise UserError(f"--seed {given} is negative.", "Give a whole number of at least 0.")
    return default if given is None else given


def _device(name: str) -> str:
    from kvbench.models.device import pick_device

    pick_device(name)
    return name
