"""The parent process: starts the children, writes what they report, keeps faults in their cells."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvbench.environment import describe
from kvbench.errors import StoppedError, UserError
from kvbench.execution.child import Child, WorkerDiedError
from kvbench.execution.guards import KEPT, disk
from kvbench.execution.job import ITSELF, NOTHING, SENTENCES, Job, Judging
from kvbench.models.references import resolve_model
from kvbench.plan import Plan
from kvbench.store.folder import RUN, RunFolder, write_atomic
from kvbench.store.records import Cell, DocumentRecord, Failure, GenerationRecord

SMALL_MODEL_BYTES = 256 << 20
MOST_CHILDREN = 4


@dataclass
class _Run:
    """What the parent knows while children measure."""

    plan: Plan
    folder: RunFolder
    command: list[str]
    console: Console
    children: list[Child[Job]]
    fresh: bool
    ready: int = 0
    opened: bool = False

    @property
    def cells(self) -> dict[str, Cell]:
        return {cell.key: cell for cell in self.plan.cells}


def execute(plan: Plan, command: list[str], console: Console, fresh: bool = False) -> None:
    """Measure everything in the plan that is not yet on disk, or all of it if ``fresh``.

    A cell whose child is killed is marked as failed, and the others go on in a new child.

    Raises:
        UserError: the plan cannot be carried out (nothing was written), or the disk is full.
        WorkerDiedError: a child died before it was ready.
    """
    events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    run = _Run(plan, RunFolder(plan.folder), command, console, [], fresh)
    with ExitStack() as stack, Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(), console=console, transient=True,
    ) as progress:
        bar = progress.add_task("loading the model", total=None)
        stack.callback(_stop, run.children)
        for number, job in enumerate(_jobs(plan)):
            run.children.append(Child(job, number, events))
        while not all(child.ended for child in run.children):
            number, event = events.get()
            child = run.children[number]
            if event is not None:
                _handle(run, child, event, progress, bar)
            elif not child.ended:
                rest = _without_victim(run, child)
                child.stop()
                if rest is None:
                    child.ended = True
                else:
                    run.children[number] = Child(rest, number, events)


def _stop(children: list[Child[Job]]) -> None:
    for child in children:
        child.stop()


def _jobs(plan: Plan) -> list[Job]:
    """One job per child. A small model on a CPU is bound by the cost of calls, not of arithmetic,
    so that several single-threaded children are faster than one with several threads."""
    request = plan.request
    cores = request.threads or os.cpu_count() or 1
    on_cpu = request.device == "cpu" or (request.device == "auto" and not _cuda())
    small = 0 < plan.model.weight_bytes <= SMALL_MODEL_BYTES
    shards = min(cores, MOST_CHILDREN) if on_cpu and small and not _has_large_judge(plan.judging) else 1
    threads = max(1, cores // shards) if shards > 1 or request.threads else 0
    return [
        Job(
            plan.cells, plan.model.location, plan.task_files, str(request.data) if request.data else None,
            request.limit, threads, shard, shards, plan.judging,
        )
        for shard in range(shards)
    ]


def _has_large_judge(judging: Judging) -> bool:
    """Whether every child would load a model of its own that is large, or of unknown size."""
    names = {judging.scorer, judging.features} - {NOTHING, ITSELF, SENTENCES}
    return any(not 0 < resolve_model(name).weight_bytes <= SMALL_MODEL_BYTES for name in names)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _handle(run: _Run, child: Child[Job], event: dict[str, Any], progress: Progress, bar: Any) -> None:
    match event.pop("event"):
        case "refused":
            raise UserError(event["message"], event["hint"])
        case "ready":
            run.ready += 1
            progress.update(bar, total=event["total"], description="measuring")
            if run.opened:
                child.tell(json.dumps(_done(run)))
            elif run.ready == len(run.children):
                _open(run, event["tasks"])
                _say_what_is_left_out(run.console, event["tasks"])
                for other in run.children:
                    other.tell(json.dumps(_done(run)))
        case "at":
            child.at = event["cell"]
            progress.update(bar, description=run.cells[event["cell"]].label)
        case "tick":
            progress.advance(bar, event["tokens"])
        case "records":
            cell = run.cells[event["cell"]]
            load = GenerationRecord.load if cell.writes else DocumentRecord.load
            with disk(run.folder.path, KEPT, StoppedError):
                run.folder.append(cell, [load(record) for record in event["records"]])
        case "failed":
            _fail(run, Failure(**event))
        case "end":
            child.ended = True


def _say_what_is_left_out(console: Console, tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        if task["skipped_documents"] or task["dropped_tokens"]:
            console.print(
                f"{name}: {len(task['documents'])} documents; {task['skipped_documents']} too short or too long were "
                f"skipped; {task['dropped_tokens']} tokens are in no sequence.", highlight=False,
            )


def _fail(run: _Run, failure: Failure) -> None:
    with disk(run.folder.path, KEPT, StoppedError):
        run.folder.fail(run.cells[failure.cell], failure)
    run.console.print(f"[red]failed[/] {escape(f'{failure.error} {failure.hint}')}", highlight=False)


def _without_victim(run: _Run, child: Child[Job]) -> Job | None:
    """The dead child's job without the cell that it died in; None if nothing is left of it.

    Raises:
        WorkerDiedError: it died before it measured anything.
    """
    reason = child.death()
    if not run.opened:
        raise WorkerDiedError(f"{reason} {child.hint()}".strip())
    if child.at is None:  # a second child, dead before it measured: its cells cannot be done here
        for cell in child.job.cells:
            _fail(run, Failure(cell.key, f"{cell.label}: {reason}", child.hint()))
        return None
    victim = run.cells[child.at]
    _fail(run, Failure(victim.key, f"{victim.label}: {reason}", child.hint()))
    rest = tuple(cell for cell in child.job.cells if cell.key != victim.key)
    return replace(child.job, cells=rest) if rest else None


def _done(run: _Run) -> dict[str, list[str]]:
    return {cell.key: sorted(run.folder.documents(cell)) for cell in run.plan.cells}


def _open(run: _Run, tasks: dict[str, Any]) -> None:
    """Write ``run.json`` and the cells' folders: from here on there is something to continue."""
    plan, folder = run.plan, run.folder
    with disk(folder.path, "Choose another folder with --out."):
        folder.path.mkdir(parents=True, exist_ok=True)
        if run.fresh:
            folder.clear()
        earlier = folder.manifest() if (folder.path / RUN).exists() else {}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = {
            "schema": 1, "content": plan.content, "started": earlier.get("started", now),
            "command": run.command, "limit": plan.request.limit, "finished": None,
            "sources": {name: corpus.source for name, corpus in plan.corpora.items()},
            "tasks": tasks, "environment": describe(),
            "cells": [dataclasses.asdict(cell) for cell in plan.cells],
        }
        write_atomic(folder.path / RUN, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        for cell in plan.cells:
            folder.open_cell(cell)
    run.opened = True
