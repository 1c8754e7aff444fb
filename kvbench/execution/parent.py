"""The parent process of a run: gives shards of plans to child processes, and is the only one that writes to disk.

Several parents may share a run folder: each locks a shard before it gives it to a child, checks which of its
records are already on disk, and skips the shards that another parent has locked.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import TaskID

from kvbench.errors import StoppedError, UserError
from kvbench.execution.channel import Advanced, At, End, Event, Failed, Ready, Records, Refused
from kvbench.execution.job import Order
from kvbench.execution.locks import KEPT, disk
from kvbench.execution.notices import Notices
from kvbench.execution.pool import Events, WorkerHandle, started_workers
from kvbench.execution.process import WorkerDiedError
from kvbench.execution.resume import found_on_disk, is_complete, is_done, remaining
from kvbench.execution.run_writer import RunWriter
from kvbench.execution.shards import Shard, ShardLocks, split_into_shards
from kvbench.execution.so_far import Display, SoFar
from kvbench.planning.quality import Plan
from kvbench.store.folder import RunFolder, record_of
from kvbench.store.records import Failure

POLL = 0.5
"""Seconds between two checks for shards that other processes have released."""


@dataclass(frozen=True)
class ExecutionOptions:
    """How plans are executed.

    Attributes:
        fresh: measure again what is on disk.
        fail_fast: stop at the first failure.
        timeout: seconds without an event after which a child is killed and its current cell fails.
        children: maximum number of child processes; 0 for as many as are useful.
        skip_infeasible: leave out cells that cannot be measured on the documents, instead of refusing the plan.
        says_found: say what is on disk already.
        told: see :class:`Notices`.
    """

    fresh: bool = False
    fail_fast: bool = False
    timeout: float = 3600.0
    children: int = 0
    skip_infeasible: bool = False
    says_found: bool = True
    told: set[str] = field(default_factory=set)


@dataclass
class _Run:
    """State of the execution of all plans.

    Attributes:
        tokens, records: of the finished shards; ``total``, ``all_records``: of all shards known so far.
    """

    plans: Sequence[Plan]
    writer: RunWriter
    options: ExecutionOptions
    notices: Notices
    progress: Display
    bar: TaskID
    so_far: SoFar = field(default_factory=SoFar)
    tokens: int = 0
    records: int = 0
    total: int = 0
    all_records: int = 0


@dataclass
class _PlanState:
    """The child processes that measure one plan, and the shards that are left, None until they are known."""

    plan: Plan
    handles: list[WorkerHandle]
    locks: ShardLocks
    shards: list[Shard] | None = None


class _FailFastError(Exception):
    """A cell has failed, and ``fail_fast`` is set."""


def execute(
    plans: Sequence[Plan], folder: Path, content: str, command: list[str], console: Console, options: ExecutionOptions
) -> None:
    """Measure everything in the plans that is not yet on disk, or all of it if ``options.fresh``.

    A cell whose child dies or hangs is marked as failed, and the others continue in a new child. The cells of a
    plan that cannot be executed are marked as failed too, unless nothing at all could be measured.

    Args:
        content: hash of the request.

    Raises:
        UserError: no plan can be executed (nothing was written), or the disk is full.
        WorkerDiedError: nothing was written, and the children of the first plan died before they were ready.
    """
    with Display(console) as progress:
        bar = progress.add_task("loading the model", total=None, documents="")
        cells = {cell.key: cell for plan in plans for cell in plan.cells}
        sources = {name: corpus.source for plan in plans for name, corpus in plan.corpora.items()}
        limit = plans[0].request.limit
        writer = RunWriter(RunFolder(folder), content, limit, command, cells, sources, options.fresh)
        run = _Run(plans, writer, options, Notices(console, options.told), progress, bar)
        refused: list[tuple[Plan, UserError | WorkerDiedError]] = []
        try:
            for plan in plans:
                try:
                    if is_complete(writer, plan):
                        _say_what_is_found(run, plan)
                    else:
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
        except _FailFastError:
            console.print("Stopped at the first failure; the same command goes on.", highlight=False)
        writer.describe()  # another process may have written its own meanwhile


def _carry_out(run: _Run, plan: Plan) -> None:
    """Measure one plan with its own child processes."""
    events: Events = queue.Queue()
    state = _PlanState(plan, [], ShardLocks(run.writer.folder))
    with ExitStack() as stack:
        stack.callback(state.locks.release_all)
        for handle in started_workers(plan, run.options.children, run.options.skip_infeasible, events):
            state.handles.append(handle)
            stack.callback(handle.stop)
        while not all(handle.ended for handle in state.handles):
            _end_hanging(run, state)
            try:
                number, event = events.get(timeout=POLL)
            except queue.Empty:
                for handle in state.handles:  # another process may have released a shard
                    if state.shards is not None and handle.is_idle:
                        _assign(run, state, handle)
                continue
            handle = state.handles[number]
            if event is not None:
                _handle(run, state, handle, event)
            elif not handle.ended:
                _replace_dead(run, state, handle)


def _handle(run: _Run, state: _PlanState, handle: WorkerHandle, event: Event) -> None:
    handle.touch()
    match event:
        case Refused():
            raise UserError(event.message, event.hint)
        case Ready():
            _begin(run, state, handle, event)
        case At():
            handle.child.at = event.cell
            run.progress.update(run.bar, description=run.writer.cells[event.cell].label)
        case Advanced():
            handle.tokens += event.tokens
            _show(run, state)
        case Records():
            cell = run.writer.cells[event.cell]
            records = [record_of(cell, raw) for raw in event.records]
            run.writer.append(event.cell, records)
            handle.records += len(records)
            run.so_far.add(cell, records)
            run.progress.found = run.so_far.line(cell)
        case Failed():
            _fail(run, event.failure)
        case End():
            assert handle.shard is not None
            _finish(run, state, handle.shard)
            handle.shard = None
            for other in state.handles:
                if other.is_idle:
                    _assign(run, state, other)


def _begin(run: _Run, state: _PlanState, handle: WorkerHandle, ready: Ready) -> None:
    """Handle the event that a child is ready; nothing is written before all of them are."""
    handle.is_ready = True
    if state.shards is not None:
        _assign(run, state, handle)
    elif all(other.is_ready for other in state.handles):
        plan, writer = state.plan, run.writer
        settings = {cell.workload: cell.setting for cell in plan.cells}
        writer.tasks |= {settings[name]: info for name, info in ready.tasks.items()}
        writer.probes[plan.model.name] = ready.probe
        damaged = writer.open(plan.cells, ready.masks)
        for infeasible in ready.infeasible:  # known beforehand: not a reason to stop
            writer.fail(infeasible)
            run.notices.once(infeasible.sentence)
        for failure in damaged:
            _fail(run, failure)
        state.shards = split_into_shards(plan.cells, ready.tasks)
        run.total += sum(shard.tokens for shard in state.shards)
        run.all_records += sum(shard.records for shard in state.shards)
        run.notices.skipped(ready.tasks)
        _say_what_is_found(run, plan)
        for other in state.handles:
            _assign(run, state, other)


def _assign(run: _Run, state: _PlanState, handle: WorkerHandle) -> None:
    """Give a child the next shard that no process has locked; dismiss all idle children if no shards are left."""
    assert state.shards is not None
    for shard in list(state.shards):
        with disk(run.writer.folder.path, KEPT, StoppedError):
            is_mine = state.locks.take(shard.name)
        if not is_mine:
            continue
        left = remaining(run.writer, shard)
        if left is None:
            _finish(run, state, shard)
            continue
        handle.take(shard)
        handle.child.tell(Order(shard.workload, shard.documents, *left).to_json())
        return
    if not state.shards:
        for other in state.handles:
            other.dismiss()


def _finish(run: _Run, state: _PlanState, shard: Shard) -> None:
    assert state.shards is not None
    state.shards.remove(shard)
    state.locks.release(shard.name)
    run.tokens, run.records = run.tokens + shard.tokens, run.records + shard.records
    _show(run, state)


def _end_hanging(run: _Run, state: _PlanState) -> None:
    for handle in state.handles:
        if handle.shard is not None and handle.seconds_since > run.options.timeout:
            handle.child.kill(f"no sign of life for {run.options.timeout:g} s; the measuring process was ended.")
            handle.touch()


def _replace_dead(run: _Run, state: _PlanState, handle: WorkerHandle) -> None:
    """Handle the death of a child: its current cell has failed, and a new child measures the others.

    Raises:
        WorkerDiedError: it died before anything was written.
    """
    reason, hint = handle.child.death(), handle.child.hint()
    victim, shard = handle.child.at, handle.shard
    if state.shards is None:
        raise WorkerDiedError(f"{reason} {hint}".strip())
    if shard is not None:
        state.locks.release(shard.name)
        handle.shard = None
    if shard is not None and victim is not None:
        _fail(run, Failure(victim, f"{run.writer.cells[victim].label}: {reason}", hint))
        handle.restart()
        return
    handle.ended = True
    if all(other.ended for other in state.handles):  # all have died without a shard: the model cannot be loaded again
        left = {cell.key: cell for shard in state.shards for cell in shard.cells if cell.key not in run.writer.failed}
        for cell in (cell for cell in left.values() if not is_done(run.writer, cell)):
            _fail(run, Failure(cell.key, f"{cell.label}: {reason}", hint))


def _show(run: _Run, state: _PlanState) -> None:
    """Update the progress bar; plans that have not started are assumed to be as large as those that have."""
    known = sum(len(plan.cells) for plan in run.plans[: run.plans.index(state.plan) + 1])
    total = run.total * len(run.writer.cells) / max(1, known)
    working = [handle for handle in state.handles if handle.shard is not None]
    done = run.tokens + sum(handle.tokens for handle in working)
    records = run.records + sum(handle.records for handle in working)
    documents = f"{records}/{round(run.all_records * len(run.writer.cells) / max(1, known))} documents x cells"
    run.progress.update(run.bar, total=total, completed=done, documents=documents)


def _say_what_is_found(run: _Run, plan: Plan) -> None:
    said = found_on_disk(run.writer, plan) if run.options.says_found else ""
    whose = f"{plan.model.name}, seed {plan.request.seed}: " if said and len(run.plans) > 1 else ""
    run.notices.say(f"{whose}{said}")


def _fail(run: _Run, failure: Failure) -> None:
    run.writer.fail(failure)
    run.notices.failed(failure)
    if run.options.fail_fast:
        raise _FailFastError
