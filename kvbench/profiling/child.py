"""Runs a profiling child process from start to end, and collects its events in the parent."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbench.errors import UserError
from kvbench.execution.channel import At, End, Event, Failed, Ready, Records, Refused
from kvbench.execution.process import WorkerDiedError, WorkerProcess
from kvbench.profiling.job import ProfileJob
from kvbench.store.manifest import Machine
from kvbench.store.profile_records import ProfileRecord, load_profile_record
from kvbench.store.records import Cell, Failure

DAY = 24 * 3600.0


@dataclass(frozen=True)
class Outcome:
    """What a child process has measured, and the failure that ended it, if any.

    Attributes:
        records: pairs of a cell's key and a record of it, in order.
        is_short: whether it was killed by the system, as when memory is short, or took too long.
    """

    records: tuple[tuple[str, ProfileRecord], ...]
    failure: Failure | None = None
    is_short: bool = False


def run_child(
    job: ProfileJob, is_first: bool, begin: Callable[[Machine], None], show: Callable[[Cell | None], None],
    seconds: float = DAY,
) -> Outcome:
    """Run a child process until it ends.

    Args:
        is_first: whether no child has been ready before; then it is an error if this one dies.
        begin: called when the child is ready, before it measures anything.
        show: called with the cell that the child starts to measure, and with None when it has sent records.
        seconds: time limit, after which the child is killed.

    Raises:
        UserError: it refused the job.
        WorkerDiedError: the first child died before it was ready.
    """
    events: queue.Queue[tuple[int, Event | None]] = queue.Queue()
    records: list[tuple[str, ProfileRecord]] = []
    child: WorkerProcess[ProfileJob] = WorkerProcess(job, 0, events)
    cells = {cell.key: cell for cell in job.cells}
    at, is_ready = job.cells[0], False
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                _, event = events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                child.process.kill()
                return Outcome(tuple(records), Failure(at.key, f"gave up after {seconds:g} s"), is_short=True)
            match event:
                case None:
                    return _died(child, at, records, is_first and not is_ready)
                case Refused():
                    raise UserError(event.message, event.hint)
                case Ready():
                    begin(event.machine)
                    is_ready = True
                    child.tell("go")
                case At():
                    at = cells[event.cell]
                    show(at)
                case Records():
                    records += [(event.cell, load_profile_record(raw)) for raw in event.records]
                    show(None)
                case Failed():
                    return Outcome(tuple(records), event.failure)
                case End():
                    return Outcome(tuple(records))
    finally:
        child.stop()


def _died(
    child: WorkerProcess[ProfileJob], at: Cell, records: Sequence[tuple[str, ProfileRecord]], is_fatal: bool
) -> Outcome:
    """The outcome of a child that died: its current cell has failed."""
    reason, hint = child.death(), child.hint()
    if is_fatal:
        raise WorkerDiedError(f"{reason} {hint}".strip())
    killed = child.process.returncode == -signal.SIGKILL
    return Outcome(tuple(records), Failure(at.key, f"{at.label}: {reason}", hint), killed)
