"""Events that a child process sends to its parent, one JSON line each; anything else it prints goes to its log."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import IO, Annotated, Any, Literal

from kvbench.errors import UserError
from kvbench.store.manifest import Machine, TaskInfo
from kvbench.store.records import Failure

CELL_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, MemoryError, UserError)
"""Exceptions that make one cell fail without stopping the others."""


@dataclass(frozen=True)
class Refused:
    """The job cannot be carried out; the child process exits."""

    message: str
    hint: str
    event: Literal["refused"] = "refused"


@dataclass(frozen=True)
class Ready:
    """Everything is loaded and checked; nothing has been measured yet.

    Attributes:
        tasks: workload -> how its documents were cut.
        infeasible: the cells that are left out, and why.
        masks: example masks of the methods, by method and ratio.
        probe: what a probe of the model has found, by name.
        machine: the machine and the model's sizes; for profiles only.
    """

    tasks: dict[str, TaskInfo] = field(default_factory=dict)
    infeasible: tuple[Failure, ...] = ()
    masks: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    event: Literal["ready"] = "ready"


@dataclass(frozen=True)
class At:
    """The child starts or continues to measure a cell."""

    cell: str
    event: Literal["at"] = "at"


@dataclass(frozen=True)
class Advanced:
    """Progress: ``tokens`` more tokens of the current shard are done."""

    tokens: int
    event: Literal["advanced"] = "advanced"


@dataclass(frozen=True)
class Records:
    """Finished records of a cell, as converted by ``dataclasses.asdict``."""

    cell: str
    records: tuple[dict[str, Any], ...]
    event: Literal["records"] = "records"


@dataclass(frozen=True)
class Failed:
    """A cell has failed; the child does not measure it any more."""

    failure: Failure
    event: Literal["failed"] = "failed"


@dataclass(frozen=True)
class End:
    """The current order is done; for a profile, the whole job."""

    event: Literal["end"] = "end"


Event = Refused | Ready | At | Advanced | Records | Failed | End
def event_of(line: str) -> Event:
    """Parse an event from its JSON line."""
    found: Event = _adapter().validate_python(json.loads(line))
    return found


@cache
def _adapter() -> Any:
    from pydantic import Field, TypeAdapter  # imported late: only the parent parses events

    return TypeAdapter(Annotated[Event, Field(discriminator="event")])


class Channel:
    """The child's end of the connection to its parent."""

    def __init__(self, events: IO[str]) -> None:
        self.events = events

    def say(self, event: Event) -> None:
        """Send an event immediately."""
        self.events.write(json.dumps(dataclasses.asdict(event)) + "\n")
        self.events.flush()


@contextmanager
def serving() -> Iterator[tuple[str, Channel]]:
    """Yield the job from standard input and the channel to the parent; report a ``UserError`` inside as ``Refused``."""
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    job = sys.stdin.readline()
    try:
        yield job, channel
    except UserError as error:
        channel.say(Refused(error.message, error.hint))


def failure_of(cell: str, label: str, error: BaseException, hint: str | None = None) -> Failure:
    """Turn an exception into the failure of a cell, with the first line of its message; the traceback goes to the log.

    Args:
        label: name of the cell in the message.
        hint: what the user can do; None for the hint of the error itself.
    """
    print("".join(traceback.format_exception(error)), file=sys.stderr)
    if isinstance(error, UserError):
        said, own = error.message, error.hint
    else:
        said, own = (str(error).strip().splitlines() or [type(error).__name__])[0], ""
    return Failure(cell, f"{label}: {said}{_place(error)}", own if hint is None else hint)


def _place(error: BaseException) -> str:
    """Where the code of a method of another package raised, as file and line; empty elsewhere."""
    from kvbench.methods import METHODS  # not wanted in every process that reads a channel
    from kvbench.store.source import files_of

    theirs = {str(path) for kind in METHODS.values() for path in files_of(kind)}
    found = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in theirs]
    return f" ({found[-1].filename}, line {found[-1].lineno})" if found else ""
