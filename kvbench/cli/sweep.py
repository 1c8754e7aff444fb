"""``kvbench sweep``: a grid of runs in one folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli import completion, options
from kvbench.cli.dry_run import print_plans
from kvbench.cli.measure import command_line, interruptible
from kvbench.cli.requests import quality_request

if TYPE_CHECKING:
    from rich.console import Console

    from kvbench.planning.sweep import Sweep

_WHAT, _HOW = "What to run", "How to run"


def sweep(
    context: typer.Context,
    settings_file: Annotated[Path | None, typer.Argument(
        parser=options.path,
        metavar="[CONFIG]", help="Settings file with a \\[sweep] table. \\[default: ./kvbench.toml if there is one]",
        show_default=False)] = None,
    method: Annotated[list[str] | None, typer.Option(
        autocompletion=completion.method,
        help="Compression method; repeatable. \\[default: sentinel, ccm-concat, gist]", show_default=False,
        rich_help_panel=_WHAT)] = None,
    ratio: Annotated[list[str] | None, typer.Option(
        help="Share of cache entries to remove; repeatable. \\[default: 0.3, 0.5, 0.7, 0.8, 0.9]", show_default=False,
        rich_help_panel=_WHAT)] = None,
    task: Annotated[list[str] | None, typer.Option(
        autocompletion=completion.task,
        help="Task, or a task file of your own; repeatable. \\[default: minidocs, recall]", show_default=False,
        rich_help_panel=_WHAT)] = None,
    model: Annotated[list[str] | None, typer.Option(
        autocompletion=completion.model,
        parser=options.text,
        help="Hub id or folder of a causal language model; repeatable. \\[default: kvbench-tiny]", show_default=False,
        rich_help_panel=_WHAT)] = None,
    seed: Annotated[list[int] | None, typer.Option(
        help="Seed of layouts, draws and resampling; repeatable. \\[default: 0]", show_default=False,
        rich_help_panel=_WHAT)] = None,
    data: options.Data = None,
    column: options.Column = "text",
    revision: options.Revision = None,
    share: options.Share = None,
    adapter: options.Adapter = None,
    protocol: options.Protocol = None,
    execution: options.Execution = "streamed",
    limit: options.Limit = None,
    set_: options.Set = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    time_limit: options.TimeLimit = None,
    baselines: options.Baselines = True,
    executor: Annotated[str | None, typer.Option(
        help="local, ray or slurm: where the workers run. Elsewhere they must see the run folder. \\[default: local]",
        show_default=False, rich_help_panel="Who does it")] = None,
    workers: Annotated[int | None, typer.Option(
        help="Processes that measure. \\[default: as many as are useful here; 2 elsewhere]", show_default=False, min=0,
        rich_help_panel="Who does it")] = None,
    executor_option: Annotated[list[str] | None, typer.Option(
        metavar="KEY=VALUE", help="For Ray: address, num_cpus, num_gpus; for Slurm: a parameter of submitit, such as "
        "slurm_partition=gpu; repeatable.", rich_help_panel="Who does it")] = None,
    timeout: Annotated[float | None, typer.Option(
        help="Seconds without a sign of life after which a measuring process is ended and its cell has failed. "
        "\\[default: 3600]", show_default=False, rich_help_panel="Who does it")] = None,
    keep_going: Annotated[bool | None, typer.Option(
        "--keep-going/--fail-fast", help="After a failure, measure the other cells, or stop. \\[default: keep-going]",
        show_default=False, rich_help_panel="Who does it")] = None,
    budget_tokens: options.BudgetTokens = None,
    budget_bytes: options.BudgetBytes = None,
    equal_bytes: options.EqualBytes = False,
    scorer: options.Scorer = None,
    mauve_features: options.MauveFeatures = None,
    metric: options.Metric = None,
    out: Annotated[Path | None, typer.Option(
        parser=options.path,
        help="Run folder; one of another sweep is added to. \\[default: reports/sweep-...]", show_default=False,
        rich_help_panel="Output")] = None,
    fresh: options.Fresh = False,
    json_: options.Json = False,
    wide: options.Wide = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Measure all combinations of methods, ratios, tasks, models and seeds, and survive what happens meanwhile.

    Every cell is kept under its content: the same command goes on after a crash, a power cut or Ctrl-C;
    a larger [bold]--limit[/], another method or ratio only adds to what is there, and the full cache is
    measured once for all of them. Several sweeps may share a folder at the same time. A cell that runs
    out of memory, crashes or hangs fails by itself. What a method cannot do is left out, and said.

    Examples:

      kvbench sweep --dry-run

      kvbench sweep --method sentinel --method ccm-concat --ratio 0.8 --ratio 0.9 --seed 0 --seed 1

      kvbench sweep grid.toml --executor ray --workers 8

      kvbench sweep grid.toml --executor slurm --workers 4 --executor-option slurm_partition=gpu

    Exit codes: 0 all done; 1 a cell failed, the others are complete; 2 the request was wrong and
    nothing was written; 130 interrupted, what was measured is kept.
    """
    from rich.console import Console

    from kvbench.api.measure import measure_folder
    from kvbench.config import load_settings
    from kvbench.errors import UserError, unknown
    from kvbench.execution.executors import EXECUTORS
    from kvbench.planning.quality import parse_options
    from kvbench.planning.sweep import build_sweep
    from kvbench.store.folder import RunFolder

    if settings_file is not None and config is not None:
        raise UserError("The settings file is given twice.", "Leave --config out.")
    console = Console(stderr=True)
    settings = load_settings(settings_file or config).sweep
    name = executor or settings.executor
    if name not in ("local", *EXECUTORS):
        raise unknown("executor", name, ("local", *EXECUTORS))
    models = [options.shared(each, share) for each in model or settings.model]
    seeds = [options.checked_seed(each, 0) for each in (seed if seed else settings.seed)]
    if timeout is not None and timeout <= 0:
        raise UserError(f"--timeout {timeout:g} is not above 0.", "It is a number of seconds.")
    if executor_option and name == "local":
        raise UserError("--executor-option is for --executor ray or slurm.", "Name one of them, or leave it out.")
    seconds = options.checked_time_limit(time_limit)
    if seconds is not None and name != "local":
        raise UserError(f"--time-limit is for what is measured here, not for --executor {name}.", "Use --limit.")
    request = quality_request(context.params, settings, models[0], seeds[0])
    found = build_sweep(request, models, seeds)
    if dry_run:
        RunFolder(found.folder).check(found.content, shared=True)  # it may hold another sweep
        print_plans(found.plans, found.folder, json_, skip_infeasible=True)
        return
    for note in dict.fromkeys(note for plan in found.plans for note in plan.omitted):
        console.print(f"left out: {note}", highlight=False)
    told: set[str] = set()

    def measure() -> None:
        _measure(found, console, name, workers if workers is not None else settings.workers, fresh,
                 not (settings.keep_going if keep_going is None else keep_going), timeout or settings.timeout,
                 parse_options(executor_option or []), seconds, told)

    with interruptible():
        results = measure_folder(
            found.folder, found.content, request.limit, fresh, console, measure, request.metrics, shared=True
        )
    if json_:
        sys.stdout.write(results.to_json() + "\n")
    else:
        from kvbench.reporting.tables.terminal import print_results

        print_results(results, Console(), found.folder, wide, told)
    raise typer.Exit(0 if results.ok else 1)


def _measure(
    found: Sweep, console: Console, executor: str, workers: int, fresh: bool, fail_fast: bool, timeout: float,
    settings: dict[str, str], seconds: float | None, told: set[str],
) -> None:
    from kvbench.api.measure import measure_plans
    from kvbench.execution.cluster import start_workers
    from kvbench.execution.parent import ExecutionOptions
    from kvbench.judges.mauve import measure_similarity
    from kvbench.store.folder import RunFolder

    if executor == "local":
        choices = ExecutionOptions(fresh, fail_fast, timeout, workers, skip_infeasible=True, told=told)
        measure_plans(found.plans, found.folder, found.content, command_line(), console, choices, seconds)
    else:
        start_workers(found, executor, workers or 2, settings, fresh, console)
    measure_similarity(RunFolder(found.folder), console)
