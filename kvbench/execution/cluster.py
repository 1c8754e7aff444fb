"""Sweeps on Ray or Slurm: start the workers, show progress from the run folder, and report lost workers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvbench.errors import UserError
from kvbench.execution.executors import EXECUTORS, Ended, worker_command
from kvbench.planning.sweep import Sweep
from kvbench.store.folder import RUN, RunFolder
from kvbench.store.progress import RunProgress


def start_workers(
    sweep: Sweep, executor: str, workers: int, options: Mapping[str, str], fresh: bool, console: Console
) -> None:
    """Measure a sweep with workers of an executor; returns when all have ended, with the records in the folder.

    Raises:
        UserError: the executor is not available, or the workers refuse the request.
    """
    folder = RunFolder(sweep.folder)
    recorded = RunProgress(folder)
    cells = [cell for plan in sweep.plans for cell in plan.cells]
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(), console=console, transient=True,
    ) as progress:
        bar = progress.add_task(f"{executor}: waiting for {workers} workers", total=None)

        def begin() -> None:
            if fresh and (folder.path / RUN).exists():
                folder.clear()
            with suppress(ValueError, KeyError, TypeError):  # a damaged cell, reported with the results
                if found := sum(len(recorded.documents(cell)) for cell in cells):
                    console.print(f"{found} records of this sweep are on disk; the workers measure what is missing.")

        def look(seconds: float) -> None:
            done = 0
            if manifest := folder.earlier():
                tasks = manifest.tasks
                total = sum(len(tasks[c.setting].documents) for c in cells if c.setting in tasks)
                with suppress(ValueError, KeyError, TypeError):  # a damaged cell, reported with the results
                    done = sum(len(recorded.documents(c)) for c in cells if c.setting in tasks)
                label = f"{executor}: {workers} workers"
                progress.update(bar, total=total or None, completed=done, description=label)
            time.sleep(seconds)

        ended = EXECUTORS[executor](worker_command(), workers, options, begin, look)
    _tell(ended, sweep, console)


def _tell(ended: list[Ended], sweep: Sweep, console: Console) -> None:
    """Print which workers were lost or failed; cells that they did not finish are reported with the results.

    Raises:
        UserError: no worker has measured anything, for example because the request was refused.
    """
    manifest = RunFolder(sweep.folder).earlier()
    if manifest is None or not manifest.describes(sweep.content, sweep.plans[0].request.limit):
        worst = next((worker for worker in ended if worker.code == 2), None) or next(
            (worker for worker in ended if worker.code != 0), ended[0])
        words = worst.words.splitlines() or ["it said nothing."]
        raise UserError(f"The workers could not begin: {words[-1].removeprefix('kvbench: ')}")
    for worker in ended:
        if worker.code not in (0, 1):
            last = worker.words.splitlines()[-1:] or [""]
            how = "was lost" if worker.code is None else f"ended with code {worker.code}"
            console.print(f"[yellow]a worker {how}[/] {escape(last[0])}", highlight=False)
