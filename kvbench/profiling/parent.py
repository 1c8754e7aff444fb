"""The order of a profile: what is timed in turn, what is weighed, and the search for the largest batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvbench.errors import StoppedError
from kvbench.execution.locks import KEPT, disk
from kvbench.planning.profile import ProfilePlan, at_batch
from kvbench.profiling.job import MEMORY, PROBE, ROUNDS, TIME
from kvbench.profiling.largest_batch import largest
from kvbench.profiling.measuring import Run, add, carried_out, fail, job_of, store
from kvbench.store.folder import RUN, RunFolder
from kvbench.store.profile_records import AGAIN, ProbeRecord, SearchRecord, TimingRecord
from kvbench.store.records import Cell

SMALL_BYTES = 1 << 28
"""Weights and cache below which two cells are weighed at a time."""


class _SearchFailedError(Exception):
    """A probe failed for another reason than memory."""


def profile(plan: ProfilePlan, command: list[str], console: Console, fresh: bool = False) -> None:
    """Measure everything in the plan that is not yet on disk, or all of it if ``fresh``.

    A cell whose child fails or is killed is marked as failed, and the others go on in a new child.

    Raises:
        UserError: the plan cannot be carried out (nothing was written), or the disk is full.
        WorkerDiedError: a child died before it was ready for anything.
    """
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(), console=console, transient=True,
    ) as progress:
        bar = progress.add_task("starting", total=_steps(plan))
        run = Run(plan, RunFolder(plan.folder), command, console, fresh, progress, bar)
        run.cells = {cell.key: cell for cell in plan.cells}
        if not fresh and (plan.folder / RUN).exists():
            run.cells |= {cell.key: cell for cell in run.folder.cells()}
            run.machine = run.folder.manifest().get("machine", {})
        for repeat in range(plan.request.repeats):
            for group in plan.groups:
                _repeat(run, group, repeat)
        _memory(run, [cell for group in plan.groups for cell in group if cell.method != AGAIN])
        _equal_memory(run)


def _steps(plan: ProfilePlan) -> int:
    """Requests that will be run, about."""
    request = plan.request
    cells = sum(len(group) for group in plan.groups)
    per_repeat = (request.rounds or ROUNDS) + min(request.warmups, 1)
    return cells * (request.repeats * per_repeat + 1) + 8 * len(plan.searches)


def _repeat(run: Run, group: Sequence[Cell], repeat: int) -> None:
    """One process that times the cells of a group in turn; whole, or not recorded at all."""
    while True:
        cells = [cell for cell in group if cell.key not in run.failed]
        done = [repeat in _repeats(run, cell) for cell in cells]
        if not cells or all(done):
            run.progress.advance(run.bar, sum(done) * run.plan.request.rounds)
            return
        found = carried_out(run, job_of(run, TIME, cells, repeat))
        if found.victim is None:
            # A repeat is one process: what another one measured under this number must not be paired with it.
            with disk(run.folder.path, KEPT, StoppedError):
                for cell in cells:
                    run.folder.forget(cell, f"time/{repeat}/")
            store(run, found.records)
            return
        fail(run, found.victim)


def _repeats(run: Run, cell: Cell) -> set[int]:
    """The repeats of a cell that are on disk."""
    if run.about is None and run.fresh:
        return set()
    return {r.repeat for r in run.folder.measurements(cell).values() if isinstance(r, TimingRecord) and not r.warmup}


def _memory(run: Run, cells: Sequence[Cell]) -> None:
    """A process for each cell; nothing is timed, so that small ones may run two at a time."""
    todo = [cell for cell in cells if cell.key not in run.failed and MEMORY not in run.folder.measurements(cell)]
    on_cpu = run.machine.get("device") == "cpu"
    pair = on_cpu and all(_full_bytes(run, cell) < SMALL_BYTES for cell in todo)
    threads = 1 if pair else None  # several threads of two processes starve one another
    with ThreadPoolExecutor(2 if pair else 1) as pool:
        for found in pool.map(lambda cell: carried_out(run, job_of(run, MEMORY, [cell], threads=threads)), todo):
            store(run, found.records)
            if found.victim is not None:
                fail(run, found.victim)


def _full_bytes(run: Run, cell: Cell) -> float:
    """Bytes of weights and of a whole cache."""
    options = cell.options
    tokens = (int(options["seq_len"]) + int(options["new_tokens"])) * int(options["batch_size"])
    return float(run.machine.get("weights", 0) + run.machine.get("entry", 0) * tokens)


def _equal_memory(run: Run) -> None:
    """The largest batch of every cell, and all of them in turn, each at its own."""
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
        if any(cell.key not in run.cells for cell in found):
            add(run, found)
        for repeat in range(run.plan.request.repeats):
            _repeat(run, found, repeat)


def _largest(run: Run, search: Cell) -> int:
    """The largest batch of a cell, from disk if its search has ended."""
    ended = run.folder.measurements(search).get("search") if run.about or not run.fresh else None
    if isinstance(ended, SearchRecord):
        return ended.batch
    batch = largest(lambda size: _fits(run, search, size), lambda: _guess(run, search))
    store(run, [(search.key, SearchRecord(batch))])
    return batch


def _fits(run: Run, search: Cell, batch: int) -> bool:
    """Whether a batch fits, from disk if it was tried before; a killed or late probe is one that does not."""
    known = run.folder.measurements(search).get(f"probe/{batch}") if run.about or not run.fresh else None
    if isinstance(known, ProbeRecord):
        return known.fits
    found = carried_out(run, job_of(run, PROBE, [at_batch(search, batch)]), float(run.plan.request.timeout))
    record = next((r for _, r in found.records if isinstance(r, ProbeRecord)), None)
    if record is None and found.victim is not None and not found.is_short:
        fail(run, replace(found.victim, cell=search.key))
        raise _SearchFailedError
    if record is None:
        record = ProbeRecord(batch, False, found.victim.error if found.victim else "no answer", 0)
    store(run, [(search.key, record)])
    return record.fits


def _guess(run: Run, search: Cell) -> int:
    """The batch that would fill the budget, if every row took what the first one does."""
    alone = run.folder.measurements(search).get("probe/1")
    budget, weights = run.plan.budget or run.machine.get("device_bytes") or 0, run.machine.get("weights", 0)
    if not isinstance(alone, ProbeRecord) or alone.needed <= weights:
        return 2
    return int((budget - weights) // (alone.needed - weights))
