"""The parent of a profile: one child at a time, so that nothing runs beside what is timed."""

from __future__ import annotations

import dataclasses
import json
import queue
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kvbench.environment import describe
from kvbench.errors import StoppedError, UserError
from kvbench.execution.child import Child, WorkerDiedError
from kvbench.execution.guards import KEPT, disk
from kvbench.profiling.job import MEMORY, PROBE, ROUNDS, TIME, ProfileJob
from kvbench.profiling.plan import PROFILE, ProfilePlan, at_batch
from kvbench.profiling.search import largest
from kvbench.store.folder import RUN, RunFolder, write_atomic
from kvbench.store.profile_records import (
    AGAIN,
    ProbeRecord,
    ProfileRecord,
    SearchRecord,
    TimingRecord,
    load_profile_record,
)
from kvbench.store.records import Cell, Failure

SMALL_BYTES = 1 << 28
"""Weights and cache below which two cells are weighed at a time."""

_HOURS = 24 * 3600.0


@dataclass
class _Run:
    """What the parent knows while children measure.

    Attributes:
        cells: of the plan, and those that a search has found, by key.
        failed: keys of the cells that are left alone from now on.
        about: what the first child said of model and machine; None before there was one.
        machine: the same, or what is on disk of an earlier run.
    """

    plan: ProfilePlan
    folder: RunFolder
    command: list[str]
    console: Console
    fresh: bool
    progress: Progress
    bar: TaskID
    cells: dict[str, Cell] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    about: dict[str, Any] | None = None
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Outcome:
    """What a child has measured, and the cell that it failed in.

    Attributes:
        is_short: it was killed, as one without memory is, or it took too long.
    """

    records: tuple[tuple[str, ProfileRecord], ...]
    victim: Failure | None = None
    is_short: bool = False


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
        run = _Run(plan, RunFolder(plan.folder), command, console, fresh, progress, bar)
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


def _job(
    run: _Run, kind: str, cells: Sequence[Cell], repeat: int = 0, threads: int | None = None
) -> ProfileJob:
    plan, request = run.plan, run.plan.request
    location = plan.model.location if plan.model else request.model
    return ProfileJob(
        kind, tuple(cells), location, plan.positions, request.threads if threads is None else threads, repeat,
        request.rounds, request.warmups, plan.budget,
    )


def _repeat(run: _Run, group: Sequence[Cell], repeat: int) -> None:
    """One process that times the cells of a group in turn; whole, or not recorded at all."""
    while True:
        cells = [cell for cell in group if cell.key not in run.failed]
        done = [repeat in _repeats(run, cell) for cell in cells]
        if not cells or all(done):
            run.progress.advance(run.bar, sum(done) * run.plan.request.rounds)
            return
        found = _carried_out(run, _job(run, TIME, cells, repeat))
        if found.victim is None:
            # A repeat is one process: what another one measured under this number must not be paired with it.
            with disk(run.folder.path, KEPT, StoppedError):
                for cell in cells:
                    run.folder.forget(cell, f"time/{repeat}/")
            _store(run, found.records)
            return
        _fail(run, found.victim)


def _repeats(run: _Run, cell: Cell) -> set[int]:
    """The repeats of a cell that are on disk."""
    if run.about is None and run.fresh:
        return set()
    return {r.repeat for r in run.folder.measurements(cell).values() if isinstance(r, TimingRecord) and not r.warmup}


def _memory(run: _Run, cells: Sequence[Cell]) -> None:
    """A process for each cell; nothing is timed, so that small ones may run two at a time."""
    todo = [cell for cell in cells if cell.key not in run.failed and MEMORY not in run.folder.measurements(cell)]
    on_cpu = run.machine.get("device") == "cpu"
    pair = on_cpu and all(_full_bytes(run, cell) < SMALL_BYTES for cell in todo)
    threads = 1 if pair else None  # several threads of two processes starve one another
    with ThreadPoolExecutor(2 if pair else 1) as pool:
        for found in pool.map(lambda cell: _carried_out(run, _job(run, MEMORY, [cell], threads=threads)), todo):
            _store(run, found.records)
            if found.victim is not None:
                _fail(run, found.victim)


def _full_bytes(run: _Run, cell: Cell) -> float:
    """Bytes of weights and of a whole cache."""
    options = cell.options
    tokens = (int(options["seq_len"]) + int(options["new_tokens"])) * int(options["batch_size"])
    return float(run.machine.get("weights", 0) + run.machine.get("entry", 0) * tokens)


def _equal_memory(run: _Run) -> None:
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
            _add(run, found)
        for repeat in range(run.plan.request.repeats):
            _repeat(run, found, repeat)


def _largest(run: _Run, search: Cell) -> int:
    """The largest batch of a cell, from disk if its search has ended."""
    ended = run.folder.measurements(search).get("search") if run.about or not run.fresh else None
    if isinstance(ended, SearchRecord):
        return ended.batch
    batch = largest(lambda size: _fits(run, search, size), lambda: _guess(run, search))
    _store(run, [(search.key, SearchRecord(batch))])
    return batch


def _fits(run: _Run, search: Cell, batch: int) -> bool:
    """Whether a batch fits, from disk if it was tried before; a killed or late probe is one that does not."""
    known = run.folder.measurements(search).get(f"probe/{batch}") if run.about or not run.fresh else None
    if isinstance(known, ProbeRecord):
        return known.fits
    found = _carried_out(run, _job(run, PROBE, [at_batch(search, batch)]), float(run.plan.request.timeout))
    record = next((r for _, r in found.records if isinstance(r, ProbeRecord)), None)
    if record is None and found.victim is not None and not found.is_short:
        _fail(run, replace(found.victim, cell=search.key))
        raise _SearchFailedError
    if record is None:
        record = ProbeRecord(batch, False, found.victim.error if found.victim else "no answer", 0)
    _store(run, [(search.key, record)])
    return record.fits


def _guess(run: _Run, search: Cell) -> int:
    """The batch that would fill the budget, if every row took what the first one does."""
    alone = run.folder.measurements(search).get("probe/1")
    budget, weights = run.plan.budget or run.machine.get("device_bytes") or 0, run.machine.get("weights", 0)
    if not isinstance(alone, ProbeRecord) or alone.needed <= weights:
        return 2
    return int((budget - weights) // (alone.needed - weights))


def _carried_out(run: _Run, job: ProfileJob, seconds: float = _HOURS) -> _Outcome:
    """Run a child to its end, and hand on what it measured.

    Raises:
        UserError: it refused.
        WorkerDiedError: it died before it was ready.
    """
    events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    records: list[tuple[str, ProfileRecord]] = []
    child: Child[ProfileJob] = Child(job, 0, events)
    at: str | None = None
    cells = {cell.key: cell for cell in job.cells}
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                _, event = events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                child.process.kill()
                late = Failure(at or job.cells[0].key, f"gave up after {seconds:g} s")
                return _Outcome(tuple(records), late, is_short=True)
            if event is None:
                reason, hint = child.death(), child.hint()
                if at is None and run.about is None:
                    raise WorkerDiedError(f"{reason} {hint}".strip())
                cell = cells[at or job.cells[0].key]
                killed = child.process.returncode == -signal.SIGKILL
                return _Outcome(tuple(records), Failure(cell.key, f"{cell.label}: {reason}", hint), killed)
            match event.pop("event"):
                case "refused":
                    raise UserError(event["message"], event["hint"])
                case "ready":
                    if run.about is None:
                        _open(run, event)
                    child.tell("go")
                case "at":
                    at = event["cell"]
                    run.progress.update(run.bar, description=f"{job.kind}: {cells[event['cell']].label}")
                case "record":
                    records.append((event["cell"], load_profile_record(event["record"])))
                    run.progress.advance(run.bar)
                case "failed":
                    label = cells[event["cell"]].label
                    return _Outcome(
                        tuple(records), Failure(event["cell"], f"{label}: {event['error']}", event["hint"])
                    )
                case "end":
                    return _Outcome(tuple(records))
    finally:
        child.stop()


def _store(run: _Run, records: Sequence[tuple[str, ProfileRecord]]) -> None:
    with disk(run.folder.path, KEPT, StoppedError):
        for key in dict.fromkeys(key for key, _ in records):
            run.folder.append(run.cells[key], [record for cell, record in records if cell == key])


def _fail(run: _Run, failure: Failure) -> None:
    run.failed.add(failure.cell)
    with disk(run.folder.path, KEPT, StoppedError):
        run.folder.fail(run.cells[failure.cell], failure)
    run.console.print(f"[red]failed[/] {escape(f'{failure.error} {failure.hint}'.strip())}", highlight=False)


def _open(run: _Run, about: dict[str, Any]) -> None:
    """Write ``run.json`` and the cells' folders: from here on there is something to continue."""
    folder = run.folder
    with disk(folder.path, "Choose another folder with --out."):
        folder.path.mkdir(parents=True, exist_ok=True)
        if not run.fresh:
            _check_machine(run, about)
        if run.fresh:
            folder.clear()
            run.cells = {cell.key: cell for cell in run.plan.cells}
        run.about = run.machine = about
        _write(run)
        for cell in run.cells.values():
            folder.open_cell(cell)


def _check_machine(run: _Run, about: dict[str, Any]) -> None:
    """See that a profile is continued where it was begun.

    Raises:
        UserError: device, precision or threads are others.
    """
    for what in ("device", "device_name", "dtype", "threads"):
        if run.machine and run.machine.get(what) != about[what]:
            raise UserError(
                f"{run.folder.path} was measured with {what} {run.machine.get(what)}, and here it is {about[what]}: "
                "their seconds do not belong together.", "Use --fresh, or another --out.",
            )


def _add(run: _Run, cells: Sequence[Cell]) -> None:
    """Cells that a search has found."""
    with disk(run.folder.path, KEPT, StoppedError):
        for cell in cells:
            run.cells[cell.key] = cell
            run.folder.open_cell(cell)
        _write(run)


def _write(run: _Run) -> None:
    path, request, about = run.folder.path / RUN, run.plan.request, run.machine
    earlier = run.folder.manifest() if path.exists() else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    threads = f"|threads:{about['threads']}" if about["device"] == "cpu" else ""
    manifest = {
        "schema": 1, "content": run.plan.content, "started": earlier.get("started", now), "command": run.command,
        "limit": request.repeats, "finished": None, "sources": {PROFILE: "random token ids"},
        "tasks": {run.plan.cells[0].setting: {
            "kind": PROFILE, "repeats": request.repeats, "notes": about["notes"], "device": about["device"],
            "documents": [], "budget": run.plan.budget or about["device_bytes"],
            "signature": f"profile|{request.fill}|{about['dtype']}|{about['device']}{threads}|sdpa|v:1",
        }},
        "machine": about, "environment": describe(),
        "cells": [dataclasses.asdict(cell) for cell in run.cells.values()],
    }
    write_atomic(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
