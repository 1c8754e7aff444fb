"""The parent: gives shards of plans to children, and is the only one that writes to disk.

Several parents may share a run folder: each claims a shard before it gives it to a child, looks what of it is
already on disk, and leaves what another one holds.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kvbench.errors import StoppedError, UserError
from kvbench.execution.channel import Advanced, At, End, Event, Failed, Ready, Records, Refused
from kvbench.execution.job import Order
from kvbench.execution.locks import KEPT, disk
from kvbench.execution.pool import Events, WorkerHandle, started_workers
from kvbench.execution.process import WorkerDiedError
from kvbench.execution.resume import is_done, is_whole, left_of
from kvbench.execution.run_writer import RunWriter
from kvbench.execution.shards import Shard, ShardLocks, parts_of
from kvbench.planning.quality import Plan
from kvbench.store.folder import RunFolder, record_of
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Failure

POLL = 0.5
"""Seconds between two looks at what other processes hold."""


@dataclass(frozen=True)
class ExecutionOptions:
    """How plans are carried out.

    Attributes:
        fresh: measure again what is on disk.
        fail_fast: stop at the first failure.
        timeout: seconds without a sign of life after which a child is ended, and its cell has failed.
        children: most children; 0 for as many as are useful.
        skip_infeasible: leave out what a method cannot do with these documents, instead of refusing all.
    """

    fresh: bool = False
    fail_fast: bool = False
    timeout: float = 3600.0
    children: int = 0
    skip_infeasible: bool = False


@dataclass
class _Run:
    """All plans on their way.

    Attributes:
        tokens: of the shards that are done, and ``total`` of all shards that are known.
    """

    plans: Sequence[Plan]
    writer: RunWriter
    options: ExecutionOptions
    console: Console
    progress: Progress
    bar: TaskID
    tokens: int = 0
    total: int = 0


@dataclass
class _Crew:
    """The children that measure one plan, and what is left of it."""

    plan: Plan
    handles: list[WorkerHandle]
    claims: ShardLocks
    shards: list[Shard] | None = None


class _EnoughError(Exception):
    """A cell has failed, and the user wants to stop then."""


def execute(
    plans: Sequence[Plan], folder: Path, content: str, command: list[str], console: Console, options: ExecutionOptions
) -> None:
    """Measure everything in the plans that is not yet on disk, or all of it if ``options.fresh``.

    A cell whose child is killed, or hangs, is marked as failed, and the others go on in a new child. So are
    the cells of a plan that cannot be carried out, unless it is the only one.

    Args:
        content: hash of what is asked for.

    Raises:
        UserError: no plan can be carried out (nothing was written), or the disk is full.
        WorkerDiedError: the children of the only plan died before they were ready.
    """
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(), console=console, transient=True,
    ) as progress:
        bar = progress.add_task("loading the model", total=None)
        cells = {cell.key: cell for plan in plans for cell in plan.cells}
        sources = {name: corpus.source for plan in plans for name, corpus in plan.corpora.items()}
        limit = plans[0].request.limit
        writer = RunWriter(RunFolder(folder), content, limit, command, cells, sources, options.fresh)
        run = _Run(plans, writer, options, console, progress, bar)
        refused: list[tuple[Plan, UserError | WorkerDiedError]] = []
        try:
            for plan in plans:
                try:
                    if not is_whole(writer, plan):
                        _carry_out(run, plan)
                except StoppedError:
                    raise
                except (UserError, WorkerDiedError) as error:
                    refused.append((plan, error))
                    if options.fail_fast and writer.opened:
                        break
            if refused and not writer.opened:
                raise refused[0][1]
            for plan, reason in refused:
                message, hint = (reason.message, reason.hint) if isinstance(reason, UserError) else (str(reason), "")
                for cell in (c for c in plan.cells if c.key not in writer.failed and not is_done(writer, c)):
                    _fail(run, Failure(cell.key, f"{cell.label}: {message}", hint))
        except _EnoughError:
            console.print("Stopped at the first failure; the same command goes on.", highlight=False)
        writer.describe()  # another process may have described the folder as its own meanwhile


def _carry_out(run: _Run, plan: Plan) -> None:
    """Measure one plan with children of its own."""
    events: Events = queue.Queue()
    crew = _Crew(plan, [], ShardLocks(run.writer.folder))
    with ExitStack() as stack:
        stack.callback(crew.claims.release_all)
        for handle in started_workers(plan, run.options.children, run.options.skip_infeasible, events):
            crew.handles.append(handle)
            stack.callback(handle.stop)
        while not all(handle.ended for handle in crew.handles):
            _end_hanging(run, crew)
            try:
                number, event = events.get(timeout=POLL)
            except queue.Empty:
                for handle in crew.handles:  # another process may have let go of a shard
                    if crew.shards is not None and handle.is_idle:
                        _assign(run, crew, handle)
                continue
            handle = crew.handles[number]
            if event is not None:
                _handle(run, crew, handle, event)
            elif not handle.ended:
                _replace_dead(run, crew, handle)


def _handle(run: _Run, crew: _Crew, handle: WorkerHandle, event: Event) -> None:
    handle.touch()
    match event:
        case Refused():
            raise UserError(event.message, event.hint)
        case Ready():
            _begin(run, crew, handle, event)
        case At():
            handle.child.at = event.cell
            run.progress.update(run.bar, description=run.writer.cells[event.cell].label)
        case Advanced():
            handle.tokens += event.tokens
            _show(run, crew)
        case Records():
            cell = run.writer.cells[event.cell]
            run.writer.append(event.cell, [record_of(cell, raw) for raw in event.records])
        case Failed():
            _fail(run, event.failure)
        case End():
            assert handle.shard is not None
            _finish(run, crew, handle.shard)
            handle.shard = None
            for other in crew.handles:
                if other.is_idle:
                    _assign(run, crew, other)


def _begin(run: _Run, crew: _Crew, handle: WorkerHandle, ready: Ready) -> None:
    """A child is ready. Nothing is written before all of them are."""
    handle.is_ready = True
    if crew.shards is not None:
        _assign(run, crew, handle)
    elif all(other.is_ready for other in crew.handles):
        plan, writer = crew.plan, run.writer
        settings = {cell.workload: cell.setting for cell in plan.cells}
        writer.tasks |= {settings[name]: info for name, info in ready.tasks.items()}
        writer.probes[plan.model.name] = ready.probe
        damaged = writer.open(plan.cells, ready.masks)
        for infeasible in ready.infeasible:  # known beforehand, and no reason to stop
            writer.fail(infeasible)
            _tell(run, infeasible)
        for failure in damaged:
            _fail(run, failure)
        crew.shards = parts_of(plan.cells, ready.tasks)
        run.total += sum(shard.tokens for shard in crew.shards)
        _say_what_is_left_out(run.console, ready.tasks)
        for other in crew.handles:
            _assign(run, crew, other)


def _assign(run: _Run, crew: _Crew, handle: WorkerHandle) -> None:
    """Give a child the next shard that nobody holds; send it home if nothing is left of the plan."""
    assert crew.shards is not None
    for shard in list(crew.shards):
        with disk(run.writer.folder.path, KEPT, StoppedError):
            is_mine = crew.claims.take(shard.name)
        if not is_mine:
            continue
        left = left_of(run.writer, shard)
        if left is None:
            _finish(run, crew, shard)
            continue
        handle.take(shard)
        handle.child.tell(Order(shard.workload, shard.documents, *left).to_json())
        return
    if not crew.shards:
        for other in crew.handles:
            other.go_home()


def _finish(run: _Run, crew: _Crew, shard: Shard) -> None:
    assert crew.shards is not None
    crew.shards.remove(shard)
    crew.claims.release(shard.name)
    run.tokens += shard.tokens
    _show(run, crew)


def _end_hanging(run: _Run, crew: _Crew) -> None:
    for handle in crew.handles:
        if handle.shard is not None and handle.seconds_since > run.options.timeout:
            handle.child.kill(f"no sign of life for {run.options.timeout:g} s; the measuring process was ended.")
            handle.touch()


def _replace_dead(run: _Run, crew: _Crew, handle: WorkerHandle) -> None:
    """A child has died: the cell that it was at has failed, and a new child goes on with the rest.

    Raises:
        WorkerDiedError: it died before anything was written.
    """
    reason, hint = handle.child.death(), handle.child.hint()
    victim, shard = handle.child.at, handle.shard
    if crew.shards is None:
        raise WorkerDiedError(f"{reason} {hint}".strip())
    if shard is not None:
        crew.claims.release(shard.name)
        handle.shard = None
    if shard is not None and victim is not None:
        _fail(run, Failure(victim, f"{run.writer.cells[victim].label}: {reason}", hint))
        handle.restart()
        return
    handle.ended = True
    if all(other.ended for other in crew.handles):  # none of them can even load the model again
        left = {cell.key: cell for shard in crew.shards for cell in shard.cells if cell.key not in run.writer.failed}
        for cell in (cell for cell in left.values() if not is_done(run.writer, cell)):
            _fail(run, Failure(cell.key, f"{cell.label}: {reason}", hint))


def _show(run: _Run, crew: _Crew) -> None:
    """The bar; plans that have not been cut yet are taken to be as large as those that have."""
    known = sum(len(plan.cells) for plan in run.plans[: run.plans.index(crew.plan) + 1])
    total = run.total * len(run.writer.cells) / max(1, known)
    done = run.tokens + sum(handle.tokens for handle in crew.handles if handle.shard is not None)
    run.progress.update(run.bar, total=total, completed=done)


def _say_what_is_left_out(console: Console, tasks: dict[str, TaskInfo]) -> None:
    for name, task in tasks.items():
        if task.skipped_documents or task.dropped_tokens:
            console.print(
                f"{name}: {len(task.documents)} documents; {task.skipped_documents} too short or too long were "
                f"skipped; {task.dropped_tokens} tokens are in no sequence.", highlight=False,
            )


def _fail(run: _Run, failure: Failure) -> None:
    run.writer.fail(failure)
    _tell(run, failure)
    if run.options.fail_fast:
        raise _EnoughError


def _tell(run: _Run, failure: Failure) -> None:
    word = f"{failure.word}:" if failure.left_out else f"[red]{failure.word}[/]"
    run.console.print(f"{word} {escape(f'{failure.error} {failure.hint}')}", highlight=False)
