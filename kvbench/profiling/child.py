"""A profiling child from its start to its end, seen from the parent."""

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
    """What a child has measured, and the cell that it failed in.

    Attributes:
        records: key of a cell and a record of it, in order.
        is_short: it was killed, as one without memory is, or it took too long.
    """

    records: tuple[tuple[str, ProfileRecord], ...]
    failure: Failure | None = None
    is_short: bool = False


def run_child(
    job: ProfileJob, is_first: bool, begin: Callable[[Machine], None], show: Callable[[Cell | None], None],
    seconds: float = DAY,
) -> Outcome:
    """Run a child to its end.

    Args:
        is_first: no child before it was ever ready.
        begin: called when the child is ready and before it measures anything.
        show: called with the cell that the child comes to, and with None when it has measured something.
        seconds: after which it is killed.

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
    """The outcome of a child that died: the cell it was at has failed."""
    reason, hint = child.death(), child.hint()
    if is_fatal:
        raise WorkerDiedError(f"{reason} {hint}".strip())
    killed = child.process.returncode == -signal.SIGKILL
    return Outcome(tuple(records), Failure(at.key, f"{at.label}: {reason}", hint), killed)
