"""``kvbench train --queue``: one line of progress for every adapter, and their held-out curves as a table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from kvbench.training.curve import Scores
    from kvbench.training.loop import Follow, Measure, Progress
    from kvbench.training.queue import Queue, Queued


def run_queue(path: Path, device: str, threads: int) -> None:
    """Train what is left of a queue, then print its curves.

    Raises:
        UserError: the file is faulty, or an adapter cannot be trained as asked.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from kvbench.training.queue import Queue

    queue = Queue(path, device, threads)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=20),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"), TextColumn("{task.fields[found]}"),
        TimeRemainingColumn(),
    )
    try:
        with Bar(*columns, console=Console(stderr=True)) as bar:
            lines = _Lines(bar, queue)
            diverged = queue.run(lines.follow)
    except KeyboardInterrupt:
        typer.echo("kvbench: interrupted; checkpoints are kept, and the same command goes on.", err=True)
        raise typer.Exit(130) from None
    show_curves(path, False)
    for said in diverged:
        typer.echo(f"kvbench: {said} It was left there; a lower rate under another name may do better.", err=True)
    raise typer.Exit(1 if diverged else 0)


class _Lines:
    """A line of progress for every adapter of a queue."""

    def __init__(self, bar: Bar, queue: Queue) -> None:
        self.bar = bar
        self.tasks = {
            one.name: bar.add_task(
                one.name, total=one.request.steps * one.tokens_per_step, start=False,
                completed=one.steps_done * one.tokens_per_step, found="finished" if one.is_finished else "",
            )
            for one in queue.queued
        }

    def follow(self, one: Queued) -> Follow:
        """Shows the progress of one adapter."""
        task = self.tasks[one.name]

        def followed(training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
            self.bar.start_task(task)
            found = ""
            for step, loss in training:
                if step % every == 0 or step == one.request.steps:
                    scores = measure(step, loss) or {}
                    found = "".join(f", {ratio}: {score['nll']:.3f}" for ratio, score in scores.items())
                self.bar.update(task, completed=step * one.tokens_per_step, found=f"loss {loss:.3f}{found}")
            self.bar.stop_task(task)

        return followed


def show_curves(path: Path, as_json: bool, figure: Path | None = None) -> None:
    """Print the held-out curves of a queue as a table, or as one JSON document.

    Args:
        figure: where to draw them as well, without an ending.

    Raises:
        UserError: the file is faulty, or the figure cannot be written.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kvbench.training.queue import Queue, curve_rows

    queue = Queue(path)
    rows = list(curve_rows(queue))
    if figure is not None:
        _draw(queue, rows, figure)
    if as_json:
        names = ("name", "tokens", "of", "loss", "held_out")
        found = [{**dict(zip(names, row, strict=True)), "loss": _number(row[3])} for row in rows]
        sys.stdout.write(json.dumps({"schema": 1, "about": queue.file.about, "rows": found}, indent=1) + "\n")
        return
    ratios = list(dict.fromkeys(ratio for *_, scores in rows for ratio in scores))
    with_recall = any("recall" in score for *_, scores in rows for score in scores.values())
    table = Table(title=f"{queue.out}: nats per token on held-out text, by ratio", title_justify="left",
                  box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "tokens", "of", "loss", *ratios, *(f"recall {ratio}" for ratio in ratios if with_recall)):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    before = ""
    for name, tokens, total, loss, scores in rows:
        cells = [_shown(scores, ratio, "nll", ".4f") for ratio in ratios]
        cells += [_shown(scores, ratio, "recall", ".2f") for ratio in ratios if with_recall]
        table.add_row(
            "" if name == before else name, f"{tokens:,}" if total else "-", f"{total:,}" if total else "-",
            "-" if _number(loss) is None else f"{loss:.4f}", *cells,
        )
        before = name
    console = Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=140)
    console.print(table)


def _draw(queue: Queue, rows: list[tuple[str, int, int, float | None, Scores]], figure: Path) -> None:
    """Draw the curves of a queue.

    Raises:
        UserError: nothing has been measured, or the files cannot be written.
    """
    from kvbench.errors import UserError
    from kvbench.reporting.figures.training import Curve, training_figure

    methods = {one.name: one.request.method for one in queue.queued}
    points: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for name, tokens, _, _, scores in rows:
        points.setdefault(name, []).append((tokens, {ratio: score["nll"] for ratio, score in scores.items()}))
    curves = [Curve(name, methods.get(name, name), found) for name, found in points.items()]
    try:
        written = training_figure(curves, figure.parent, figure.name.removesuffix(".png").removesuffix(".pdf"))
    except OSError as error:
        raise UserError(f"{figure} cannot be written: {error.strerror}.", "Choose another place.") from error
    if not written:
        raise UserError(f"{queue.path}: nothing has been measured on held-out text yet.", "Draw the curves later.")
    typer.echo(f"figure: {', '.join(map(str, written))}", err=True)


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _shown(scores: dict[str, dict[str, float]], ratio: str, name: str, form: str) -> str:
    found = scores.get(ratio, {}).get(name)
    return "-" if found is None else format(found, form)
