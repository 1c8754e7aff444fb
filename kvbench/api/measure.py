"""Measuring a plan: lock its folder, measure what is missing, and compute the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from kvbench.execution.parent import ExecutionOptions
    from kvbench.planning.profile import ProfilePlan
    from kvbench.planning.quality import Plan
    from kvbench.store.manifest import Manifest
    from kvbench.store.rows import Results


def may_leave_out(plan: Plan) -> bool:
    """Whether a method that cannot be used on a task is left out of it, with a note: if there are several tasks."""
    return len({cell.task for cell in plan.cells}) > 1


def run_plan(
    plan: Plan, command: list[str], console: Console, fresh: bool, seconds: float | None = None,
    told: set[str] | None = None,
) -> Results:
    """Measure the quality that a plan asks for; see :func:`measure_folder`.

    Args:
        seconds: measure as many documents as fit into this time; None for all.
        told: is given the sentences about cells that are left out, once they have been printed.
    """
    from kvbench.execution.parent import ExecutionOptions
    from kvbench.judges.mauve import measure_similarity
    from kvbench.store.folder import RunFolder

    def measure() -> None:
        choices = ExecutionOptions(
            fresh=fresh, skip_infeasible=may_leave_out(plan), told=set() if told is None else told
        )
        measure_plans([plan], plan.folder, plan.content, command, console, choices, seconds)
        measure_similarity(RunFolder(plan.folder), console)

    request = plan.request
    return measure_folder(
        plan.folder, plan.content, request.limit, fresh, console, measure, request.metrics,
        cells=[cell.key for cell in plan.cells],
    )


def measure_plans(
    plans: Sequence[Plan], path: Path, content: str, command: list[str], console: Console, choices: ExecutionOptions,
    seconds: float | None,
) -> None:
    """Measure plans into a folder, on all of their documents or on as many as fit into a time."""
    from kvbench.execution.parent import execute
    from kvbench.execution.time_limit import measure_within
    from kvbench.store.folder import RunFolder

    rounds = 0

    def measure(some: Sequence[Plan]) -> None:
        nonlocal rounds  # only the first round begins anew
        fresh = choices.fresh and rounds == 0
        execute(some, path, content, command, console, replace(choices, fresh=fresh, says_found=seconds is None))
        rounds += 1

    if seconds is None:
        measure(plans)
    else:
        measure_within(
            plans, RunFolder(path), seconds, measure, console, fresh=choices.fresh, fail_fast=choices.fail_fast
        )


def profile_plan(plan: ProfilePlan, command: list[str], console: Console, fresh: bool) -> Results:
    """Measure the time and memory that a plan asks for; see :func:`measure_folder`."""
    from kvbench.profiling.parent import profile

    return measure_folder(
        plan.folder, plan.content, plan.request.repeats, fresh, console, lambda: profile(plan, command, console, fresh)
    )


def measure_folder(
    path: Path, content: str, limit: int, fresh: bool, console: Console, measure: Callable[[], None],
    only: Sequence[str] = (), shared: bool = False, cells: Sequence[str] = (),
) -> Results:
    """Measure a run folder unless it is complete, and return its results, failures included.

    Args:
        content: hash of the request; the folder must hold the same, or nothing.
        limit: documents per task, or repeats; a finished folder of the same limit is not measured again.
        measure: does the work; records are in the folder when it returns.
        only: metrics of generated text to show; all if empty.
        shared: other processes may measure into the folder meanwhile, and it may hold another run.
        cells: keys of the requested cells, if a folder of the same content may hold fewer or more of them.

    Raises:
        UserError: the folder cannot be used.
        KeyboardInterrupt: the user has stopped it; what was measured is kept.
    """
    from rich.markup import escape

    from kvbench.analysis.results import compute_results
    from kvbench.errors import StoppedError
    from kvbench.execution.locks import KEPT, disk, finish, locked
    from kvbench.execution.process import WorkerDiedError
    from kvbench.store.folder import RESULTS, RunFolder, write_atomic
    from kvbench.store.records import Failure
    from kvbench.store.rows import Results

    folder = RunFolder(path)
    folder.check(content, fresh, shared)
    with nullcontext() if shared else locked(path):
        manifest = None if fresh else folder.earlier()
        if manifest and manifest.finished and manifest.describes(content, limit) and _is_current(manifest, cells):
            found = compute_results(folder, only)
            if found.ok:
                console.print(f"Already measured ({manifest.finished}); --fresh measures again.")
                return found
            console.print("What was measured is no longer whole, and is completed.")
        try:
            measure()
        except WorkerDiedError as death:
            console.print(f"[red]failed[/] {escape(str(death))}", highlight=False)
            return Results(str(path), False, (Failure("", str(death)),))
        except KeyboardInterrupt:
            console.print("kvbench: interrupted; what was measured is kept, and the same command goes on.")
            raise
        if folder.manifest().content != content:
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


def _is_current(manifest: Manifest, wanted: Sequence[str]) -> bool:
    """Whether a finished run has exactly the wanted cells, all measured by the current version of their method."""
    from kvbench.store.faults import fault_of

    keys = {cell.key for cell in manifest.cells}
    return manifest.knows_models and set(wanted or keys) == keys and not any(map(fault_of, manifest.cells))
