"""The parent: gives parts of plans to children, and is the only one that writes to disk.

Several parents may share a run folder: each claims a part before it gives it to a child, looks what of it is
already on disk, and leaves what another one holds.
"""

from __future__ import annotations

import dataclasses
import json
import queue
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kvbench.environment import describe
from kvbench.errors import StoppedError, UserError
from kvbench.execution.child import WorkerDiedError
from kvbench.execution.claims import Claims
from kvbench.execution.crew import Hand, crew_of
from kvbench.execution.guards import KEPT, disk
from kvbench.execution.job import Order
from kvbench.execution.parts import Part, parts_of
from kvbench.plan import Plan
from kvbench.store.folder import RUN, RunFolder, write_atomic
from kvbench.store.recorded import Recorded
from kvbench.store.records import Cell, DocumentRecord, Failure, GenerationRecord

POLL = 0.5
"""Seconds between two looks at what other processes hold."""


@dataclass(frozen=True)
class Conduct:
    """How plans are carried out.

    Attributes:
        fresh: measure again what is on disk.
        fail_fast: stop at the first failure.
        timeout: seconds without a sign of life after which a child is ended, and its cell has failed.
        children: most children; 0 for as many as are useful.
        omit: what the documents are too long or too short for fails by itself, and is no reason to refuse the rest.
    """

    fresh: bool = False
    fail_fast: bool = False
    timeout: float = 3600.0
    children: int = 0
    omit: bool = False


@dataclass
class _Run:
    """What the parent knows of all plans.

    Attributes:
        cells: of all plans, by key.
        tasks: setting -> what a child said of the task under it.
        failed: keys of the cells that are left alone from now on.
        opened: whether the folder has been written to.
        tokens: of the parts that are done, and ``total`` of all parts that are known.
    """

    plans: Sequence[Plan]
    folder: RunFolder
    content: str
    command: list[str]
    console: Console
    conduct: Conduct
    progress: Progress
    bar: TaskID
    recorded: Recorded
    cells: dict[str, Cell]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    opened: bool = False
    tokens: int = 0
    total: int = 0


@dataclass
class _Crew:
    """The children that measure one plan, and what is left of it."""

    plan: Plan
    hands: list[Hand]
    claims: Claims
    parts: list[Part] | None = None


class _EnoughError(Exception):
    """A cell has failed, and the user wants to stop then."""


def execute(
    plans: Sequence[Plan], folder: Path, content: str, command: list[str], console: Console, conduct: Conduct
) -> None:
    """Measure everything in the plans that is not yet on disk, or all of it if ``conduct.fresh``.

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
        files = RunFolder(folder)
        cells = {cell.key: cell for plan in plans for cell in plan.cells}
        run = _Run(plans, files, content, command, console, conduct, progress, bar, Recorded(files), cells)
        refused: list[tuple[Plan, UserError | WorkerDiedError]] = []
        try:
            for plan in plans:
                try:
                    _carry_out(run, plan)
                except StoppedError:
                    raise
                except (UserError, WorkerDiedError) as error:
                    refused.append((plan, error))
            if refused and not run.opened:
                raise refused[0][1]
            for plan, reason in refused:
                message, hint = (reason.message, reason.hint) if isinstance(reason, UserError) else (str(reason), "")
                for cell in plan.cells:
                    _fail(run, Failure(cell.key, f"{cell.label}: {message}", hint))
        except _EnoughError:
            console.print("Stopped at the first failure; the same command goes on.", highlight=False)
        describe_run(run)  # another process may have described the folder as its own meanwhile


def _carry_out(run: _Run, plan: Plan) -> None:
    """Measure one plan with children of its own, unless all of it is on disk."""
    if not run.conduct.fresh and (found := _whole(run, plan)):
        run.tasks |= found
        run.opened = True
        return
    events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    crew = _Crew(plan, [], Claims(run.folder))
    with ExitStack() as stack:
        stack.callback(crew.claims.release_all)
        for hand in crew_of(plan, run.conduct.children, run.conduct.omit, events):
            crew.hands.append(hand)
            stack.callback(hand.stop)
        while not all(hand.ended for hand in crew.hands):
            try:
                number, event = events.get(timeout=POLL)
            except queue.Empty:
                _end_hanging(run, crew)
                for hand in crew.hands:  # another process may have let go of a part
                    if crew.parts is not None and hand.is_idle:
                        _assign(run, crew, hand)
                continue
            _end_hanging(run, crew)
            hand = crew.hands[number]
            if event is not None:
                _handle(run, crew, hand, event)
            elif not hand.ended:
                _replace_dead(run, crew, hand)


def _handle(run: _Run, crew: _Crew, hand: Hand, event: dict[str, Any]) -> None:
    hand.touch()
    match event.pop("event"):
        case "refused":
            raise UserError(event["message"], event["hint"])
        case "ready":
            _begin(run, crew, hand, event)
        case "at":
            hand.child.at = event["cell"]
            run.progress.update(run.bar, description=run.cells[event["cell"]].label)
        case "tick":
            hand.tokens += event["tokens"]
            _show(run, crew)
        case "records":
            cell = run.cells[event["cell"]]
            load = GenerationRecord.load if cell.writes else DocumentRecord.load
            with disk(run.folder.path, KEPT, StoppedError):
                run.folder.append(cell, [load(record) for record in event["records"]])
        case "failed":
            _fail(run, Failure(**event))
        case "end":
            assert hand.part is not None
            _finish(run, crew, hand.part)
            hand.part = None
            for other in crew.hands:
                if other.is_idle:
                    _assign(run, crew, other)


def _begin(run: _Run, crew: _Crew, hand: Hand, ready: dict[str, Any]) -> None:
    """A child is ready. Nothing is written before all of them are."""
    hand.is_ready = True
    if crew.parts is not None:
        _assign(run, crew, hand)
    elif all(other.is_ready for other in crew.hands):
        _open(run, crew.plan, ready["tasks"])
        for unable in ready["unable"]:
            _fail(run, Failure(**unable))
        crew.parts = parts_of(crew.plan.cells, ready["tasks"])
        run.total += sum(part.tokens for part in crew.parts)
        _say_what_is_left_out(run.console, ready["tasks"])
        for other in crew.hands:
            _assign(run, crew, other)


def _assign(run: _Run, crew: _Crew, hand: Hand) -> None:
    """Give a child the next part that nobody holds; send it home if nothing is left of the plan."""
    assert crew.parts is not None
    for part in list(crew.parts):
        with disk(run.folder.path, KEPT, StoppedError):
            is_mine = crew.claims.take(part.name)
        if not is_mine:
            continue
        failed = {c.key for c in part.cells if c.key in run.failed or run.folder.failure(c) is not None}
        done = {c.key: run.recorded.documents(c) for c in part.cells if c.key not in failed}
        if all(set(part.documents) <= documents for documents in done.values()):
            _finish(run, crew, part)
            continue
        hand.take(part)
        here = {key: sorted(documents.intersection(part.documents)) for key, documents in done.items()}
        hand.child.tell(Order(part.task, part.documents, here, tuple(sorted(failed))).to_json())
        return
    if not crew.parts:
        for other in crew.hands:
            other.go_home()


def _finish(run: _Run, crew: _Crew, part: Part) -> None:
    assert crew.parts is not None
    crew.parts.remove(part)
    crew.claims.release(part.name)
    run.tokens += part.tokens
    _show(run, crew)


def _end_hanging(run: _Run, crew: _Crew) -> None:
    for hand in crew.hands:
        if hand.part is not None and hand.seconds_since > run.conduct.timeout:
            hand.child.kill(f"no sign of life for {run.conduct.timeout:g} s; the measuring process was ended.")
            hand.touch()


def _replace_dead(run: _Run, crew: _Crew, hand: Hand) -> None:
    """A child has died: the cell that it was at has failed, and a new child goes on with the rest.

    Raises:
        WorkerDiedError: it died before anything was written.
    """
    reason, hint = hand.child.death(), hand.child.hint()
    victim, part = hand.child.at, hand.part
    if crew.parts is None:
        raise WorkerDiedError(f"{reason} {hint}".strip())
    if part is not None:
        crew.claims.release(part.name)
        hand.part = None
    if part is not None and victim is not None:
        _fail(run, Failure(victim, f"{run.cells[victim].label}: {reason}", hint))
        hand.restart()
        return
    hand.ended = True
    if all(other.ended for other in crew.hands):  # none of them can even load the model again
        left = {cell.key: cell for part in crew.parts for cell in part.cells if cell.key not in run.failed}
        for cell in left.values():
            _fail(run, Failure(cell.key, f"{cell.label}: {reason}", hint))


def _show(run: _Run, crew: _Crew) -> None:
    """The bar; plans that have not been cut yet are taken to be as large as those that have."""
    known = sum(1 for plan in run.plans[: run.plans.index(crew.plan) + 1] for _ in plan.cells)
    total = run.total * len(run.cells) / max(1, known)
    done = run.tokens + sum(hand.tokens for hand in crew.hands if hand.part is not None)
    run.progress.update(run.bar, total=total, completed=done)


def _say_what_is_left_out(console: Console, tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        if task["skipped_documents"] or task["dropped_tokens"]:
            console.print(
                f"{name}: {len(task['documents'])} documents; {task['skipped_documents']} too short or too long were "
                f"skipped; {task['dropped_tokens']} tokens are in no sequence.", highlight=False,
            )


def _fail(run: _Run, failure: Failure) -> None:
    run.failed.add(failure.cell)
    with disk(run.folder.path, KEPT, StoppedError):
        run.folder.fail(run.cells[failure.cell], failure)
    run.console.print(f"[red]failed[/] {escape(f'{failure.error} {failure.hint}')}", highlight=False)
    if run.conduct.fail_fast:
        raise _EnoughError


def _open(run: _Run, plan: Plan, tasks: dict[str, Any]) -> None:
    """Write ``run.json`` and the cells' folders: from here on there is something to continue."""
    folder = run.folder
    with disk(folder.path, "Choose another folder with --out."):
        folder.path.mkdir(parents=True, exist_ok=True)
        if run.conduct.fresh and not run.opened:
            folder.clear()
        settings = {cell.task: cell.setting for cell in plan.cells}
        run.tasks |= {settings[name]: info for name, info in tasks.items()}
        describe_run(run)
        run.opened = True
        for cell in plan.cells:
            try:
                folder.open_cell(cell)
            except UserError as damage:
                _fail(run, Failure(cell.key, f"{cell.label}: {damage.message}", damage.hint))


def _whole(run: _Run, plan: Plan) -> dict[str, dict[str, Any]]:
    """What is known of the tasks of a plan that is on disk from end to end; empty if it is not."""
    if not (run.folder.path / RUN).exists():
        return {}
    manifest = run.folder.manifest()
    settings = {cell.setting for cell in plan.cells}
    if manifest["limit"] != plan.request.limit or not settings <= set(manifest["tasks"]):
        return {}
    tasks = {setting: manifest["tasks"][setting] for setting in settings}
    for cell in plan.cells:
        try:
            missing = set(tasks[cell.setting]["documents"]) - run.recorded.documents(cell)
        except (ValueError, KeyError, TypeError):
            return {}
        if missing or run.folder.failure(cell) is not None:
            return {}
    return tasks


def describe_run(run: _Run) -> None:
    """Write ``run.json``; what it says of other tasks stays, if it is of the same run."""
    plans, folder, content = run.plans, run.folder, run.content
    with disk(folder.path, KEPT, StoppedError), folder.lock("manifest"):
        earlier = folder.manifest() if (folder.path / RUN).exists() else {}
        same = earlier.get("content") == content
        now = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = {
            "schema": 1, "content": content, "started": earlier["started"] if same else now,
            "command": run.command, "limit": plans[0].request.limit, "finished": None,
            "sources": {name: corpus.source for plan in plans for name, corpus in plan.corpora.items()},
            "tasks": {**(earlier["tasks"] if same else {}), **run.tasks}, "environment": describe(),
            "cells": [dataclasses.asdict(cell) for cell in run.cells.values()],
        }
        write_atomic(folder.path / RUN, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
