"""``kvbench profile``: time and memory of compressed models, in one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli import completion, options
from kvbench.cli.dry_run import print_cells_as_json
from kvbench.cli.measure import command_line, interruptible
from kvbench.cli.requests import profile_request

if TYPE_CHECKING:
    from kvbench.planning.profile import ProfilePlan

_WHAT, _HOW, _MEMORY, _OUT = "What to profile", "How to profile", "The largest batch", "Output"


def profile(
    context: typer.Context,
    seq_len: Annotated[list[int] | None, typer.Option(
        help="Tokens of the prompt; repeatable. \\[default: 4096]", show_default=False, rich_help_panel=_WHAT)] = None,
    batch_size: Annotated[list[int] | None, typer.Option(
        help="Prompts at a time; repeatable. \\[default: 1]", show_default=False, rich_help_panel=_WHAT)] = None,
    new_tokens: Annotated[int | None, typer.Option(
        help="Tokens to write. \\[default: 128]", show_default=False, rich_help_panel=_WHAT)] = None,
    method: Annotated[list[str] | None, typer.Option(
        autocompletion=completion.method,
        help="Compression method; repeatable, with options of its own as in snapkv:window=16. \\[default: sinks and "
             "sentinel]", show_default=False,
        rich_help_panel=_WHAT)] = None,
    ratio: Annotated[list[str] | None, typer.Option(
        help="Share of cache entries to remove, in [0, 1): 0.7 keeps 30 %; repeatable. \\[default: 0.7]",
        rich_help_panel=_WHAT)] = None,
    model: Annotated[str | None, typer.Option(
        parser=options.text, autocompletion=completion.model_or_shape,
        help="Hub id, folder, or shape:NAME for random weights in a published shape, such as shape:gpt2. "
        "\\[default: kvbench-tiny, embedded]", envvar="KVBENCH_MODEL", show_default=False,
        rich_help_panel=_WHAT)] = None,
    revision: options.Revision = None,
    share: options.Share = None,
    adapter: Annotated[list[str] | None, typer.Option(
        parser=options.text,
        help="Adapter folder of a trained method; repeatable. \\[default: the shipped one, or random weights]",
        show_default=False, rich_help_panel=_WHAT)] = None,
    fill: Annotated[str | None, typer.Option(
        help="real (the prompt is read) or synthetic (the cache is filled with random entries, so that long "
        "prompts and large batches can be timed on small machines). \\[default: real]", show_default=False,
        rich_help_panel=_HOW)] = None,
    chunk: Annotated[int | None, typer.Option(
        help="Tokens of the prompt that are fed at a time; the full cache reads it at once. \\[default: 256]",
        show_default=False, rich_help_panel=_HOW)] = None,
    repeats: Annotated[int | None, typer.Option(
        help="Processes, each with the model loaded anew. \\[default: 3]", show_default=False,
        rich_help_panel=_HOW)] = None,
    rounds: Annotated[int | None, typer.Option(
        help="Timed requests of every cell in each process, taken in turn. \\[default: 4, or 2 if they are slow]",
        show_default=False, rich_help_panel=_HOW)] = None,
    warmups: Annotated[int | None, typer.Option(
        help="Most requests before the timed ones; fewer if two in a row differ by less than 5 %. \\[default: 1]",
        show_default=False, rich_help_panel=_HOW)] = None,
    seed: options.Seed = None,
    set_: options.Set = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    baselines: Annotated[bool, typer.Option(
        "--baselines/--no-baselines", help="Measure full a second time, and in the cache of transformers.",
        rich_help_panel=_HOW)] = True,
    memory_budget: Annotated[str | None, typer.Option(
        help="Find the largest batch within this much memory, weights included, such as 2GiB, or card for all that a "
        "GPU has, and time it.",
        show_default=False, rich_help_panel=_MEMORY)] = None,
    probe_timeout: Annotated[int, typer.Option(
        help="Seconds after which a batch is given up.", rich_help_panel=_MEMORY)] = 300,
    out: Annotated[Path | None, typer.Option(
        parser=options.path,
        help="Run folder: missing, empty, or one of the same profile. \\[default: reports/profile-...]",
        show_default=False, rich_help_panel=_OUT)] = None,
    fresh: Annotated[bool, typer.Option(
        "--fresh", help="Measure again what is already there.", rich_help_panel=_OUT)] = False,
    json_: Annotated[bool, typer.Option(
        "--json", help="Print one JSON document on stdout instead of tables.", rich_help_panel=_OUT)] = False,
    wide: options.Wide = False,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Print the cells and what they take; measure nothing.", rich_help_panel=_OUT)] = False,
    config: Annotated[Path | None, typer.Option(
        parser=options.path, help="Settings file. \\[default: ./kvbench.toml if there is one]", show_default=False,
        rich_help_panel=_OUT)] = None,
) -> None:
    """Measure what compression gains: prefill, first token, time per token, memory that is really free.

    Each repeat is a process of its own; methods are taken in turn; the full cache is measured twice,
    so that the noise is known, and also in the cache of transformers. Beside each speed-up stands the
    one that bytes predict. The same command continues an interrupted profile.

    Examples:

      kvbench profile --seq-len 4096

      kvbench profile --seq-len 1024 --seq-len 4096 --batch-size 1 --batch-size 8 --method sinks --method local

      kvbench profile --model shape:gpt2 --seq-len 4096 --batch-size 8 --fill synthetic

      kvbench profile --model shape:llama-3.2-1b --device cuda --dtype bfloat16 --memory-budget 24GiB

    Exit codes: 0 all done; 1 a cell failed, the others are complete; 2 the request was wrong and
    nothing was written; 130 interrupted, what was measured is kept.
    """
    import psutil
    from rich.console import Console

    from kvbench.api.measure import profile_plan
    from kvbench.config import load_settings
    from kvbench.errors import StoppedError, UserError
    from kvbench.execution.locks import KEPT, disk
    from kvbench.models.device import pick_device
    from kvbench.parsing import CARD
    from kvbench.planning.profile import build_profile_plan, doubts
    from kvbench.store.folder import RunFolder

    console = Console(stderr=True)
    settings = load_settings(config).profile
    request = profile_request(context.params, settings)
    if pick_device(request.device).type != "cuda" and memory_budget == CARD:
        raise UserError(f"--memory-budget {CARD} is for GPUs, and this is a CPU.", "Give a size, such as 2GiB.")
    plan = build_profile_plan(request)
    if dry_run:
        RunFolder(plan.folder).check(plan.content, fresh)
        _print_plan(plan, json_)
        return
    for warning in doubts(request.threads, psutil.cpu_percent(interval=0.3)):
        console.print(f"[yellow]warning[/] {warning}", highlight=False)
    with interruptible():
        results = profile_plan(plan, command_line(), console, fresh)
    if json_:
        sys.stdout.write(results.to_json() + "\n")
    else:
        from kvbench.reporting.figures.profile import profile_figures
        from kvbench.reporting.tables.terminal import print_results

        out_ = Console()
        print_results(results, out_, plan.folder, wide)
        with disk(plan.folder, KEPT, StoppedError):
            figures = profile_figures(list(results.rows), plan.folder / "figures")
        for path in (path for path in figures if path.suffix == ".png"):
            out_.print(f"figure: {path}", soft_wrap=True, highlight=False)
    raise typer.Exit(0 if results.ok else 1)


def _print_plan(plan: ProfilePlan, as_json: bool) -> None:
    if as_json:
        print_cells_as_json(plan.folder, plan.cells)
        return
    from rich.console import Console
    from rich.table import Table

    from kvbench.methods import kept
    from kvbench.methods.budget import parse_ratio
    from kvbench.store.folder import RunFolder

    folder, request = RunFolder(plan.folder), plan.request
    table = Table(
        title=f"{len(plan.cells)} cells, {request.repeats} processes -> {plan.folder}"
    )
    for column in ("cell", "method", "ratio", "length", "batch", "entries kept, about", "on disk"):
        table.add_column(column)
    for cell in plan.cells:
        length = int(cell.options["seq_len"])
        is_known = cell.ratio_asked is not None or cell.method.startswith("full")
        entries = kept(length, parse_ratio(cell.ratio_asked or "0")) if is_known else None
        batch = cell.options["batch_size"]
        table.add_row(
            cell.key, cell.name, cell.ratio_asked or "-", str(length), "largest" if batch == "0" else batch,
            "-" if entries is None else str(entries), str(len(folder.measurements(cell))),
        )
    Console().print(table)
