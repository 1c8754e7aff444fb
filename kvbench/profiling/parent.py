"""The parent process of a profile: schedules timing, memory passes and the search for the largest batch.

It starts one child process after the other (two at a time for small memory passes), and is the only one that writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kvbench.errors import UserError
from kvbench.execution.run_writer import RunWriter
from kvbench.planning.profile import ProfilePlan, at_batch
from kvbench.profiling.child import DAY, Outcome, run_child
from kvbench.profiling.job import MEMORY, PROBE, ROUNDS, TIME, ProfileJob
from kvbench.profiling.largest_batch import find_largest_batch
from kvbench.store.folder import RunFolder
from kvbench.store.manifest import PROFILE, Machine, ProfileInfo
from kvbench.store.profile_records import AGAIN, ProbeRecord, ProfileRecord, SearchRecord, TimingRecord
from kvbench.store.records import Cell, Failure

SMALL_BYTES = 1 << 28
"""Bytes of weights and cache below which the memory of two cells is measured at the same time, on a CPU."""




class _SearchFailedError(Exception):
    """A probe failed for a reason other than memory."""


@dataclass
class _Run:
    """State of a profile that is being measured.

    Attributes:
        earlier: the machine of the records that are in the folder already; None if there are none.
    """

    plan: ProfilePlan
    writer: RunWriter
    console: Console
    progress: Progress
    bar: TaskID
    earlier: Machine | None

    def measurements(self, cell: Cell) -> dict[str, ProfileRecord]:
        """Records of a cell that are on disk and need not be measured again."""
        is_replaced = self.writer.fresh and not self.writer.opened
        return {} if is_replaced else self.writer.folder.measurements(cell)

    @property
    def machine(self) -> Machine:
        return self.writer.machine or self.earlier or Machine()


def profile(plan: ProfilePlan, command: list[str], console: Console, fresh: bool = False) -> None:
    """Measure everything in the plan that is not yet on disk, or all of it if ``fresh``.

    A cell that fails, or whose child dies, is marked as failed, and the others continue in a new child.

    Raises:
        UserError: the plan cannot be carried out (nothing was written), or the disk is full.
        WorkerDiedError: a child died before any child was ready.
    """
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(), console=console, transient=True,
    ) as progress:
        bar = progress.add_task("starting", total=_steps(plan))
        folder = RunFolder(plan.folder)
        earlier = None if fresh else folder.earlier()
        found = earlier.cells if earlier else ()  # including those that a search has found
        cells = {cell.key: cell for cell in (*plan.cells, *found)}
        sources = {PROFILE: "random token ids"}
        writer = RunWriter(folder, plan.content, plan.request.repeats, command, cells, sources, fresh)
        run = _Run(plan, writer, console, progress, bar, earlier.machine if earlier else None)
        for repeat in range(plan.request.repeats):
            for group in plan.groups:
                _repeat(run, group, repeat)
        _memory(run, [cell for group in plan.groups for cell in group if cell.method != AGAIN])
        _equal_memory(run)


def _steps(plan: ProfilePlan) -> int:
    """Approximate number of requests to run, for the progress bar."""
    request = plan.request
    cells = sum(len(group) for group in plan.groups)
    per_repeat = (request.rounds or ROUNDS) + min(request.warmups, 1)
    return cells * (request.repeats * per_repeat + 1) + 8 * len(plan.searches)


def _repeat(run: _Run, group: Sequence[Cell], repeat: int) -> None:
    """Time the cells of a group in turn, in one process; if one fails, nothing is recorded and the others start
    again."""
    while True:
        cells = [cell for cell in group if cell.key not in run.writer.failed]
        done = [repeat in _repeats(run, cell) for cell in cells]
        if not cells or all(done):
            run.progress.advance(run.bar, sum(done) * run.plan.request.rounds)
            return
        found = _carried_out(run, _job(run, TIME, cells, repeat))
        if found.failure is None:
            # Requests are paired within one process: remove what an earlier process recorded under this number.
            for cell in cells:
                run.writer.forget(cell.key, f"time/{repeat}/")
            _store(run, found.records)
            return
        _fail(run, found.failure)


def _repeats(run: _Run, cell: Cell) -> set[int]:
    """Numbers of the repeats of a cell that are on disk."""
    return {r.repeat for r in run.measurements(cell).values() if isinstance(r, TimingRecord) and not r.warmup}


def _memory(run: _Run, cells: Sequence[Cell]) -> None:
    """Measure the memory of each cell in a process of its own; small ones run two at a time, since nothing is timed."""
    todo = [cell for cell in cells if cell.key not in run.writer.failed and MEMORY not in run.measurements(cell)]
    on_cpu = run.machine.device == "cpu"
    pair = on_cpu and all(_full_bytes(run, cell) < SMALL_BYTES for cell in todo)
    threads = 1 if pair else None  # several threads per process would compete for the cores
    with ThreadPoolExecutor(2 if pair else 1) as pool:
        for found in pool.map(lambda cell: _carried_out(run, _job(run, MEMORY, [cell], threads=threads)), todo):
            _store(run, found.records)
            if found.failure is not None:
                _fail(run, found.failure)


def _full_bytes(run: _Run, cell: Cell) -> float:
    """Bytes of the weights and of the full cache."""
    options = cell.options
    tokens = (int(options["seq_len"]) + int(options["new_tokens"])) * int(options["batch_size"])
    return float(run.machine.weights + run.machine.entry * tokens)


def _equal_memory(run: _Run) -> None:
    """Find the largest batch of every cell, then time the cells of each length in turn, each at its largest batch."""
    searches = run.plan.searches
    for length in dict.fromkeys(cell.options["seq_len"] for cell in searches):
        found = []
        for cell in (cell for cell in searches if cell.options["seq_len"] == length):
            try:
                batch = _largest(run, cell)
            except _SearchFailedError:
                continue
            if batch:
                found.append(at_batch(cell, batch))
        if any(cell.key not in run.writer.cells for cell in found):
            run.writer.add(found)
        for repeat in range(run.plan.request.repeats):
            _repeat(run, found, repeat)


def _largest(run: _Run, search: Cell) -> int:
    """The largest batch of a cell; read from disk if its search has ended."""
    ended = run.measurements(search).get("search")
    if isinstance(ended, SearchRecord):
        return ended.batch
    batch = find_largest_batch(lambda size: _fits(run, search, size), lambda: _guess(run, search))
    _store(run, [(search.key, SearchRecord(batch))])
    return batch


def _fits(run: _Run, search: Cell, batch: int) -> bool:
    """Whether a batch fits; read from disk if it was tried before. A killed or late probe does not fit."""
    known = run.measurements(search).get(f"probe/{batch}")
    if isinstance(known, ProbeRecord):
        return known.fits
    found = _carried_out(run, _job(run, PROBE, [at_batch(search, batch)]), float(run.plan.request.timeout))
    record = next((r for _, r in found.records if isinstance(r, ProbeRecord)), None)
    if record is None and found.failure is not None and not found.is_short:
        _fail(run, replace(found.failure, cell=search.key))
        raise _SearchFailedError
    if record is None:
        record = ProbeRecord(batch, False, found.failure.error if found.failure else "no answer", 0)
    _store(run, [(search.key, record)])
    return record.fits


def _guess(run: _Run, search: Cell) -> int:
    """The batch that fills the budget if every row needs as much memory as the first one."""
    alone = run.measurements(search).get("probe/1")
    budget, weights = run.plan.budget or run.machine.device_bytes or 0, run.machine.weights
    if not isinstance(alone, ProbeRecord) or alone.needed <= weights:
        return 2
    return int((budget - weights) // (alone.needed - weights))


def _job(run: _Run, kind: str, cells: Sequence[Cell], repeat: int = 0, threads: int | None = None) -> ProfileJob:
    plan, request = run.plan, run.plan.request
    location = plan.model.location if plan.model else request.model
    return ProfileJob(
        kind, tuple(cells), location, plan.positions, request.threads if threads is None else threads, repeat,
        request.rounds, request.warmups, plan.budget,
    )


def _carried_out(run: _Run, job: ProfileJob, seconds: float = DAY) -> Outcome:
    """Run a child process until it ends; the first one that is ready opens the run folder."""
    def begin(machine: Machine) -> None:
        if not run.writer.opened:
            _open(run, machine)

    def show(cell: Cell | None) -> None:
        if cell is None:
            run.progress.advance(run.bar)
        else:
            run.progress.update(run.bar, description=f"{job.kind}: {cell.label}")

    return run_child(job, not run.writer.opened, begin, show, seconds)


def _store(run: _Run, records: Sequence[tuple[str, ProfileRecord]]) -> None:
    for key in dict.fromkeys(key for key, _ in records):
        run.writer.append(key, [record for cell, record in records if cell == key])


def _fail(run: _Run, failure: Failure) -> None:
    run.writer.fail(failure)
    run.console.print(f"[red]failed[/] {escape(f'{failure.error} {failure.hint}'.strip())}", highlight=False)


def _open(run: _Run, machine: Machine) -> None:
    """Write ``run.json`` and the cells' folders, when the first child is ready."""
    if run.earlier is not None:
        check_machine(run.plan.folder, run.earlier, machine)
    plan, writer = run.plan, run.writer
    threads = f"|threads:{machine.threads}" if machine.device == "cpu" else ""
    writer.machine = machine
    writer.profiles[plan.cells[0].setting] = ProfileInfo(
        repeats=plan.request.repeats, notes=machine.notes, device=machine.device or "cpu",
        budget=plan.budget or machine.device_bytes,
        signature=f"profile|{plan.request.fill}|{machine.dtype}|{machine.device}{threads}|sdpa{machine.mark}|v:1",
    )
    writer.open(list(writer.cells.values()))


def check_machine(folder: Path, earlier: Machine, now: Machine) -> None:
    """Check that a profile is continued on the machine where it was begun.

    Raises:
        UserError: device, precision or number of threads differ.
    """
    for what in ("device", "device_name", "dtype", "threads"):
        before, here = getattr(earlier, what), getattr(now, what)
        if before != here:
            raise UserError(
                f"{folder} was measured with {what} {before}, and here it is {here}: their seconds do not belong "
                "together.", "Use --fresh, or another --out.",
            )
