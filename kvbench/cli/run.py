"""``kvbench run``: quality of compressed models, in one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli import options
from kvbench.cli.dry_run import print_plans
from kvbench.cli.measure import command_line, interruptible
from kvbench.cli.requests import quality_request


def run(
    context: typer.Context,
    method: options.Method = None,
    ratio: options.Ratio = None,
    task: options.Task = None,
    data: options.Data = None,
    column: options.Column = "text",
    model: options.Model = None,
    revision: options.Revision = None,
    share: options.Share = None,
    adapter: options.Adapter = None,
    protocol: options.Protocol = None,
    execution: options.Execution = "streamed",
    limit: options.Limit = None,
    budget_tokens: options.BudgetTokens = None,
    budget_bytes: options.BudgetBytes = None,
    equal_bytes: options.EqualBytes = False,
    scorer: options.Scorer = None,
    mauve_features: options.MauveFeatures = None,
    metric: options.Metric = None,
    seed: options.Seed = None,
    set_: options.Set = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    time_limit: options.TimeLimit = None,
    baselines: options.Baselines = True,
    out: Annotated[Path | None, typer.Option(
        parser=options.path, help="Run folder: missing, empty, or one of the same run. \\[default: reports/...]",
        show_default=False, rich_help_panel="Output")] = None,
    fresh: options.Fresh = False,
    json_: options.Json = False,
    wide: options.Wide = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Measure the quality of compressed models against the full cache and honest baselines.

    Each method is scored on the same text with cache entries [bold]really removed[/]; the table shows
    values with 95 % intervals, paired differences to the full cache, and the ratio that was
    realised. The same command continues an interrupted run and prints a finished one again.

    Examples:

      kvbench run --method sentinel --ratio 0.7

      kvbench run --method sinks --ratio 0.5 --ratio 0.9 --task books --data mybooks.jsonl.gz

      kvbench run --task books --data pages.parquet --column content

      kvbench run --model Qwen/Qwen3-0.6B --method local --task wikitext2 --limit 20

      kvbench run --task minidocs-gen --method sentinel --scorer gpt2-large

    Exit codes: 0 all done; 1 a cell failed, the others are complete; 2 the request was wrong and
    nothing was written; 130 interrupted, what was measured is kept.
    """
    from rich.console import Console

    from kvbench.api.measure import may_leave_out, run_plan
    from kvbench.config import load_settings
    from kvbench.planning.quality import build_plan
    from kvbench.store.folder import RunFolder

    console = Console(stderr=True)
    settings = load_settings(config).run
    seconds = options.checked_time_limit(time_limit)
    request = quality_request(
        context.params, settings, model or settings.model, options.checked_seed(seed, settings.seed)
    )
    plan = build_plan(request)
    if dry_run:
        RunFolder(plan.folder).check(plan.content, fresh)
        print_plans([plan], plan.folder, json_, may_leave_out(plan))
        return
    told: set[str] = set()
    with interruptible():
        results = run_plan(plan, command_line(), console, fresh, seconds, told)
    if json_:
        sys.stdout.write(results.to_json() + "\n")
    else:
        from kvbench.reporting.tables.terminal import print_results

        print_results(results, Console(), plan.folder, wide, told)
    raise typer.Exit(0 if results.ok else 1)
