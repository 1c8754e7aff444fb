"""``kvbench train``: adapters of trained methods, and the small base model itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli import completion, options

if TYPE_CHECKING:
    from kvbench.training.loop import Measure, Progress
    from kvbench.training.request import AdapterRequest

app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich", no_args_is_help=True)

Data = Annotated[list[Path] | None, typer.Option(
    parser=options.path,
    help="Training text: rows of .jsonl, .json, .csv, .tsv or .parquet, a .txt, each also packed (.gz, .bz2, .xz, "
    ".zst), or a folder of .txt; repeatable, read in order.")]
Column = Annotated[str, typer.Option(
    help="What the text is called in --data and --held-out; plain text has no columns.")]
HeldOutFile = Annotated[Path | None, typer.Option(
    parser=options.path, help="Text to measure on now and then; never trained on.")]
Out = Annotated[Path | None, typer.Option(
    parser=options.path, help="Folder to write; a checkpoint in it is continued.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew even if there is a checkpoint.")]
Every = Annotated[int, typer.Option(help="Steps between checkpoints and held-out measurements.", min=1)]


@app.callback()
def train(
    context: typer.Context,
    method: Annotated[str | None, typer.Option(
        help="Trained method, such as sentinel.", autocompletion=completion.trained)] = None,
    data: Data = None,
    column: Column = "text",
    out: Out = None,
    model: options.Model = None,
    revision: options.Revision = None,
    share: options.Share = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(help="Sequences per step; at equal tokens, few are better.", min=1)] = 2,
    length: Annotated[int, typer.Option(help="Text tokens per sequence.", min=32)] = 512,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", min=0.0)] = 2e-3,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank pairs.", min=1)] = 64,
    held_out: HeldOutFile = None,
    every: Every = 200,
    seed: options.Seed = None,
    set_: Annotated[list[str] | None, typer.Option(
        "--set", metavar="KEY=VALUE",
        help="adapter=gated|plain|full|writer, objective=text|distil, autocast=bfloat16|none, dropout=0.0, "
             "boundary=1.0 (weight of the loss behind a compressed piece), and the method's own, such as "
             "n_comp=4; repeatable.",
    )] = None,
    device: options.Device = None,
    threads: options.Threads = None,
    fresh: Fresh = False,
    queue: Annotated[Path | None, typer.Option(
        parser=options.path,
        help="Train all adapters of a TOML file; only --device and --threads go with it.")] = None,
    curves: Annotated[bool, typer.Option(
        "--curves", help="With --queue: print what has been measured so far, and train nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="With --curves: print one JSON document on stdout.")] = False,
    figure: Annotated[Path | None, typer.Option(
        parser=options.path, help="With --curves: also draw them, as FIGURE.png and FIGURE.pdf.")] = None,
) -> None:
    """Train the adapter of a compression method on a frozen base model, or a queue of them.

    A gated adapter acts on the method's special tokens only, so that without them the model is the
    base model exactly; adapter=plain is a LoRA on every token, as in the Sentinel paper; adapter=full
    trains every weight. Training is seeded, writes checkpoints, and goes on where it was when the
    same command is run again.

    --queue trains the adapters of a TOML file one after the other, or in turns (slice = 51200, in
    tokens), so that all of them reach any number of tokens together.

    Example: kvbench train --method sentinel --data books.jsonl.gz --out my-adapter

    Then: kvbench run --method sentinel --adapter my-adapter

    Example: kvbench train --queue adapters.toml

    Then, at any moment: kvbench train --queue adapters.toml --curves --figure curves
    """
    if context.invoked_subcommand is not None:
        return
    from kvbench.errors import UserError

    if queue is not None:
        from kvbench.cli.train_queue import run_queue, show_curves

        _check_alone(context, ("queue", "device", "threads", "curves", "json_", "figure"))
        if (json_ or figure) and not curves:
            raise UserError("--json and --figure are for --curves.", "Add --curves, or leave them out.")
        if curves:
            show_curves(queue, json_, figure)
        else:
            run_queue(queue, device or "auto", threads or 0)
        return
    from kvbench.planning.quality import parse_options
    from kvbench.training.adapter_recipe import run_adapter_training
    from kvbench.training.request import AdapterRequest

    if curves or json_ or figure:
        raise UserError("--curves, --json and --figure are for --queue FILE.")
    if method is None or out is None:
        raise UserError("Training needs --method and --out, or --queue.", "See kvbench train --help.")
    request: AdapterRequest = AdapterRequest(
        method=method, data=tuple(data or ()), out=out, model=options.shared(model or "kvbench-tiny", share),
        revision=revision, steps=steps, batch=batch_size, length=length, lr=lr, rank=rank,
        held_out=held_out, every=every, seed=seed or 0, options=parse_options(set_ or []),
        device=device or "auto", threads=threads or 0, fresh=fresh, column=column,
    )
    run_adapter_training(request, _followed)
    typer.echo(f"adapter: {out}")


@app.command("base")
def base(
    data: Data = None,
    column: Column = "text",
    out: Out = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 5256,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.", min=1)] = 4,
    length: Annotated[int, typer.Option(help="Tokens per sequence, and the context.", min=64)] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", min=0.0)] = 3e-3,
    tokenizer: Annotated[Path | None, typer.Option(
        parser=options.path,
        help="Folder of a tokenizer. \\[default: train one on the data]", show_default=False)] = None,
    every: Every = 200,
    seed: options.Seed = None,
    device: options.Device = None,
    threads: options.Threads = None,
    fresh: Fresh = False,
) -> None:
    """Train a small base model from scratch, as kvbench-tiny was made.

    Three quarters running text, a quarter copies and facts to recall; Muon and AdamW. The
    defaults are the recipe of kvbench-tiny: 21.5 M tokens, about 95 minutes on two CPU cores.

    Example: kvbench train base --data books.jsonl.gz --out my-base

    Then: kvbench run --model my-base --method sinks
    """
    from kvbench.errors import UserError
    from kvbench.training.base_recipe import run_base_training
    from kvbench.training.base_training import BasePlan

    if out is None:
        raise UserError("Training needs --out.", "See kvbench train base --help.")
    plan = BasePlan(steps=steps, batch=batch_size, length=length, lr=lr, seed=seed or 0)
    folder = run_base_training(
        plan, tuple(data or ()), out, tokenizer, device or "auto", threads or 0, every, _followed, fresh, column,
    )
    typer.echo(f"model: {folder}")


def _check_alone(context: typer.Context, allowed: tuple[str, ...]) -> None:
    """Check that no other option is given on the command line than those.

    Raises:
        UserError: there is one.
    """
    from kvbench.errors import UserError

    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source.name == "COMMANDLINE":
            raise UserError(
                f"{parameter.opts[0]} does not go with --queue.", "Write it into the file, for all adapters or for one."
            )


def _followed(training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
    """Run a training and show loss and remaining time."""
    try:
        _drawn(training, steps, measure, every)
    except KeyboardInterrupt:
        typer.echo("kvbench: interrupted; the last checkpoint is kept, and the same command goes on.", err=True)
        raise typer.Exit(130) from None


def _drawn(training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("loss {task.fields[loss]:.4f}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("steps"), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    ) as bar:
        shown = bar.add_task("", total=steps, loss=float("nan"))
        for step, loss in training:
            bar.update(shown, completed=step, loss=loss)
            if step % every == 0 or step == steps:
                found = measure(step, loss)
                if found:
                    bar.console.print(f"step {step}: loss {loss:.4f} {found}", highlight=False)
