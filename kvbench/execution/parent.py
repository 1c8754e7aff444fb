"""The parent: gives parts of plans to children, and is the only one that writes to disk.

Several parents may share a run folder: each claims a part before it gives it to a child, looks what of it is
already on disk, and leaves what another one holds.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kvbench.errors import StoppedError, UserError
from kvbench.execution.claims import Claims
from kvbench.execution.job import Order
from kvbench.execution.locks import KEPT, disk
from kvbench.execution.pool import Events, Hand, crew_of
from kvbench.execution.process import WorkerDiedError
from kvbench.execution.run_writer import Ledger
from kvbench.execution.shards import Part, parts_of
from kvbench.planning.quality import Plan
from kvbench.store.folder import RunFolder
from kvbench.store.records import Failure

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
        omit: what a method cannot do with these documents is left out, and is no reason to refuse the rest.
    """

    fresh: bool = False
    fail_fast: bool = False
    timeout: float = 3600.0
    children: int = 0
    omit: bool = False


@dataclass
class _Run:
    """All plans on their way.

    Attributes:
        tokens: of the parts that are done, and ``total`` of all parts that are known.
    """

    ledger: Ledger
    conduct: Conduct
    console: Console
    progress: Progress
    bar: TaskID
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
        ledger = Ledger(plans, RunFolder(folder), content, command, conduct.fresh)
        run = _Run(ledger, conduct, console, progress, bar)
        refused: list[tuple[Plan, UserError | WorkerDiedError]] = []
        try:
            for plan in plans:
                try:
                    if not ledger.is_whole(plan):
                        _carry_out(run, plan)
                except StoppedError:
                    raise
                except (UserError, WorkerDiedError) as error:
                    refused.append((plan, error))
                    if conduct.fail_fast and ledger.opened:
                        break
            if refused and not ledger.opened:
                raise refused[0][1]
            for plan, reason in refused:
                message, hint = (reason.message, reason.hint) if isinstance(reason, UserError) else (str(reason), "")
                for cell in (c for c in plan.cells if c.key not in ledger.failed and not ledger.is_done(c)):
                    _fail(run, Failure(cell.key, f"{cell.label}: {message}", hint))
        except _EnoughError:
            console.print("Stopped at the first failure; the same command goes on.", highlight=False)
        ledger.describe()  # another process may have described the folder as its own meanwhile


def _carry_out(run: _Run, plan: Plan) -> None:
    """Measure one plan with children of its own."""
    events: Events = queue.Queue()
    crew = _Crew(plan, [], Claims(run.ledger.folder))
    with ExitStack() as stack:
        stack.callback(crew.claims.release_all)
        for hand in crew_of(plan, run.conduct.children, run.conduct.omit, events):
            crew.hands.append(hand)
            stack.callback(hand.stop)
        while not all(hand.ended for hand in crew.hands):
            _end_hanging(run, crew)
            try:
                number, event = events.get(timeout=POLL)
            except queue.Empty:
                for hand in crew.hands:  # another process may have let go of a part
                    if crew.parts is not None and hand.is_idle:
                        _assign(run, crew, hand)
                continue
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
            run.progress.update(run.bar, description=run.ledger.cells[event["cell"]].label)
        case "tick":
            hand.tokens += event["tokens"]
            _show(run, crew)
        case "records":
            run.ledger.append(event["cell"], event["records"])
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
        damaged = run.ledger.open(crew.plan, ready["tasks"], ready["masks"], ready["probe"])
        for unable in ready["unable"]:  # known beforehand, and no reason to stop
            run.ledger.fail(Failure(**unable))
            _tell(run, Failure(**unable))
        for failure in damaged:
            _fail(run, failure)
        crew.parts = parts_of(crew.plan.cells, ready["tasks"])
        run.total += sum(part.tokens for part in crew.parts)
        _say_what_is_left_out(run.console, ready["tasks"])
        for other in crew.hands:
            _assign(run, crew, other)


def _assign(run: _Run, crew: _Crew, hand: Hand) -> None:
    """Give a child the next part that nobody holds; send it home if nothing is left of the plan."""
    assert crew.parts is not None
    for part in list(crew.parts):
        with disk(run.ledger.folder.path, KEPT, StoppedError):
            is_mine = crew.claims.take(part.name)
        if not is_mine:
            continue
        left = run.ledger.left_of(part)
        if left is None:
            _finish(run, crew, part)
            continue
        hand.take(part)
        hand.child.tell(Order(part.variant, part.documents, *left).to_json())
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
        _fail(run, Failure(victim, f"{run.ledger.cells[victim].label}: {reason}", hint))
        hand.restart()
        return
    hand.ended = True
    if all(other.ended for other in crew.hands):  # none of them can even load the model again
        left = {cell.key: cell for part in crew.parts for cell in part.cells if cell.key not in run.ledger.failed}
        for cell in (cell for cell in left.values() if not run.ledger.is_done(cell)):
            _fail(run, Failure(cell.key, f"{cell.label}: {reason}", hint))


def _show(run: _Run, crew: _Crew) -> None:
    """The bar; plans that have not been cut yet are taken to be as large as those that have."""
    plans = run.ledger.plans
    known = sum(len(plan.cells) for plan in plans[: plans.index(crew.plan) + 1])
    total = run.total * len(run.ledger.cells) / max(1, known)
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
    run.ledger.fail(failure)
    _tell(run, failure)
    if run.conduct.fail_fast:
        raise _EnoughError


def _tell(run: _Run, failure: Failure) -> None:
    word = f"{failure.word}:" if failure.left_out else f"[red]{failure.word}[/]"
    run.console.print(f"{word} {escape(f'{failure.error} {failure.hint}')}", highlight=False)
