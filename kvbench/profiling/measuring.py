"""A profile that is being measured: what is known of it, one child at a time, and what is written."""

from __future__ import annotations

import dataclasses
import json
import queue
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from kvbench.environment import describe
from kvbench.errors import StoppedError, UserError
from kvbench.execution.locks import KEPT, disk
from kvbench.execution.process import WorkerDiedError, WorkerProcess
from kvbench.planning.profile import PROFILE, ProfilePlan
from kvbench.profiling.job import ProfileJob
from kvbench.store.folder import RUN, RunFolder, write_atomic
from kvbench.store.profile_records import ProfileRecord, load_profile_record
from kvbench.store.records import Cell, Failure

_HOURS = 24 * 3600.0


@dataclass
class Run:
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
class Outcome:
    """What a child has measured, and the cell that it failed in.

    Attributes:
        is_short: it was killed, as one without memory is, or it took too long.
    """

    records: tuple[tuple[str, ProfileRecord], ...]
    victim: Failure | None = None
    is_short: bool = False


def job_of(
    run: Run, kind: str, cells: Sequence[Cell], repeat: int = 0, threads: int | None = None
) -> ProfileJob:
    plan, request = run.plan, run.plan.request
    location = plan.model.location if plan.model else request.model
    return ProfileJob(
        kind, tuple(cells), location, plan.positions, request.threads if threads is None else threads, repeat,
        request.rounds, request.warmups, plan.budget,
    )


def carried_out(run: Run, job: ProfileJob, seconds: float = _HOURS) -> Outcome:
    """Run a child to its end, and hand on what it measured.

    Raises:
        UserError: it refused.
        WorkerDiedError: it died before it was ready.
    """
    events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    records: list[tuple[str, ProfileRecord]] = []
    child: WorkerProcess[ProfileJob] = WorkerProcess(job, 0, events)
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
                return Outcome(tuple(records), late, is_short=True)
            if event is None:
                reason, hint = child.death(), child.hint()
                if at is None and run.about is None:
                    raise WorkerDiedError(f"{reason} {hint}".strip())
                cell = cells[at or job.cells[0].key]
                killed = child.process.returncode == -signal.SIGKILL
                return Outcome(tuple(records), Failure(cell.key, f"{cell.label}: {reason}", hint), killed)
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
                    return Outcome(
                        tuple(records), Failure(event["cell"], f"{label}: {event['error']}", event["hint"])
                    )
                case "end":
                    return Outcome(tuple(records))
    finally:
        child.stop()


def store(run: Run, records: Sequence[tuple[str, ProfileRecord]]) -> None:
    with disk(run.folder.path, KEPT, StoppedError):
        for key in dict.fromkeys(key for key, _ in records):
            run.folder.append(run.cells[key], [record for cell, record in records if cell == key])


def fail(run: Run, failure: Failure) -> None:
    run.failed.add(failure.cell)
    with disk(run.folder.path, KEPT, StoppedError):
        run.folder.fail(run.cells[failure.cell], failure)
    run.console.print(f"[red]failed[/] {escape(f'{failure.error} {failure.hint}'.strip())}", highlight=False)


def _open(run: Run, about: dict[str, Any]) -> None:
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


def _check_machine(run: Run, about: dict[str, Any]) -> None:
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


def add(run: Run, cells: Sequence[Cell]) -> None:
    """Cells that a search has found."""
    with disk(run.folder.path, KEPT, StoppedError):
        for cell in cells:
            run.cells[cell.key] = cell
            run.folder.open_cell(cell)
        _write(run)


def _write(run: Run) -> None:
    path, request, about = run.folder.path / RUN, run.plan.request, run.machine
    earlier = run.folder.manifest() if path.exists() else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    threads = f"|threads:{about['threads']}" if about["device"] == "cpu" else ""
    kernel = f"sdpa{about.get('mark', '')}"
    manifest = {
        "schema": 1, "content": run.plan.content, "started": earlier.get("started", now), "command": run.command,
        "limit": request.repeats, "finished": None, "sources": {PROFILE: "random token ids"},
        "tasks": {run.plan.cells[0].setting: {
            "kind": PROFILE, "repeats": request.repeats, "notes": about["notes"], "device": about["device"],
            "documents": [], "budget": run.plan.budget or about["device_bytes"],
            "signature": f"profile|{request.fill}|{about['dtype']}|{about['device']}{threads}|{kernel}|v:1",
        }},
        "machine": about, "environment": describe(),
        "cells": [dataclasses.asdict(cell) for cell in run.cells.values()],
    }
    write_atomic(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
