"""What measuring commands share: one folder, locked; from disk if it is there, measured otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from kvbench.store.records import Results


def measured(
    path: Path, content: str, limit: int, fresh: bool, console: Console, measure: Callable[[], None],
    only: Sequence[str] = (), shared: bool = False, cells: Sequence[str] = (),
) -> Results:
    """The results of a run folder, complete or with what failed.

    Args:
        content: hash of what is asked for; the folder must hold the same, or nothing.
        limit: how much of it; a finished folder of the same limit is not measured again.
        measure: does the work; records are in the folder when it returns.
        only: metrics of written text to show; all if empty.
        shared: other processes may measure into the folder meanwhile, and it may hold another run.
        cells: their keys, where a folder of the same content may hold fewer or more of them.

    Raises:
        UserError: the folder cannot be used.
        typer.Exit: interrupted.
    """
    from rich.markup import escape

    from kvbench.analysis.results import compute_results
    from kvbench.errors import StoppedError
    from kvbench.execution.locks import KEPT, disk, finish, locked
    from kvbench.execution.process import WorkerDiedError
    from kvbench.store.faults import fault_of
    from kvbench.store.folder import RESULTS, RUN, RunFolder, write_atomic
    from kvbench.store.records import Failure, Results

    folder = RunFolder(path)
    folder.check(content, fresh or shared)
    with nullcontext() if shared else locked(path):
        manifest = folder.manifest() if not fresh and (path / RUN).exists() else {}
        is_done = manifest.get("finished") and (manifest.get("limit"), manifest["content"]) == (limit, content)
        wanted = set(cells) or {cell.key for cell in folder.cells()} if is_done else set()
        if is_done and folder.knows_models() and {cell.key for cell in folder.cells()} == wanted and not any(
            fault_of(cell) for cell in folder.cells()
        ):
            found = compute_results(folder, only)
            if found.ok:
                console.print(f"Already measured ({manifest['finished']}); --fresh measures again.")
                return found
            console.print("What was measured is no longer whole, and is completed.")
        try:
            measure()
        except WorkerDiedError as death:
            console.print(f"[red]failed[/] {escape(str(death))}", highlight=False)
            return Results(str(path), False, (Failure("", str(death)),))
        except KeyboardInterrupt:
            console.print("kvbench: interrupted; what was measured is kept, and the same command goes on.")
            raise typer.Exit(130) from None
        if folder.manifest()["content"] != content:
            raise StoppedError(
                f"Another sweep has described {path} as its own meanwhile; what was measured is kept.",
                "The same command prints its results.",
            )
        results = compute_results(folder, only)
        with disk(path, KEPT, StoppedError):
            write_atomic(path / RESULTS, results.to_json() + "\n")
            if results.ok:
                finish(folder, content)
        return results
