"""``kvbench show``: the texts generated after one document's prefix, or the answers about a context, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli import options


def show(
    run: Annotated[Path, typer.Argument(
        parser=options.path, help="Run folder, as 'kvbench run' named it.", metavar="RUN")],
    document: Annotated[str | None, typer.Option(
        help="Id of the document. \\[default: the first one]", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(
        help="Task of the run; with :known for the question known. \\[default: the first that writes text or answers]",
        show_default=False)] = None,
) -> None:
    """Print a prefix and what people, the full cache and each method wrote after it, or the answers to
    the questions about a context.

    Greedy texts are marked where they first differ from the full cache's. Needs neither the model
    nor PyTorch.

    Example: kvbench show reports/sentinel-0.7-1a2b3c4d5e --document bread
    """
    from rich.console import Console

    from kvbench.errors import UserError, unknown
    from kvbench.reporting.tables.answers import answers_side_by_side
    from kvbench.reporting.tables.side_by_side import side_by_side
    from kvbench.store.folder import RunFolder

    folder = RunFolder(run)
    if folder.manifest().without_texts:
        raise UserError(
            f"{run} is an unpacked bundle, whose texts were taken out.", "Ask for the run folder it was made from."
        )
    infos = folder.manifest().tasks
    writing = [cell for cell in folder.cells() if (cell.writes or cell.answers) and cell.setting in infos]
    tasks = {cell.workload: cell.setting for cell in reversed(writing)}  # the first of several models or seeds
    if not tasks:
        raise UserError(f"No task of {run} writes text or answers.", "Run one with --task minidocs-gen.")
    if task is not None and task not in tasks:
        raise unknown("task of this run", task, tasks)
    chosen = task or next(iter(reversed(tasks)))
    documents = infos[tasks[chosen]].documents
    if document is not None and document not in documents:
        raise unknown(f"document of task {chosen}", document, documents)
    console = Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=140)
    show_one = answers_side_by_side if infos[tasks[chosen]].asks else side_by_side
    console.print(show_one(folder, tasks[chosen], document or documents[0]))
