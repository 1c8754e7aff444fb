"""What a child says to its parent: events, a JSON line each; whatever else it prints goes to its log."""

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

CONTAINED = (RuntimeError, ValueError, IndexError, MemoryError, UserError)
"""What may go wrong in a cell without ending the others."""


@dataclass(frozen=True)
class Refused:
    """The job cannot be carried out; the child ends."""

    message: str
    hint: str
    event: Literal["refused"] = "refused"


@dataclass(frozen=True)
class Ready:
    """Everything is loaded and checked, and nothing has been measured.

    Attributes:
        tasks: workload -> how it was cut.
        infeasible: cells that are left out, and why.
        masks: pictures of methods, by method and ratio.
        probe: facts that a probe of the model has shown.
        machine: of a profile.
    """

    tasks: dict[str, TaskInfo] = field(default_factory=dict)
    infeasible: tuple[Failure, ...] = ()
    masks: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    event: Literal["ready"] = "ready"


@dataclass(frozen=True)
class At:
    """The child begins with a cell, or goes on with it."""

    cell: str
    event: Literal["at"] = "at"


@dataclass(frozen=True)
class Advanced:
    """So many more tokens of the shard in hand are done."""

    tokens: int
    event: Literal["advanced"] = "advanced"


@dataclass(frozen=True)
class Records:
    """Finished records of a cell, as ``dataclasses.asdict`` makes them."""

    cell: str
    records: tuple[dict[str, Any], ...]
    event: Literal["records"] = "records"


@dataclass(frozen=True)
class Failed:
    """A cell has failed; the child leaves it alone from now on."""

    failure: Failure
    event: Literal["failed"] = "failed"


@dataclass(frozen=True)
class End:
    """The order, or the whole job of a profile, is done."""

    event: Literal["end"] = "end"


Event = Refused | Ready | At | Advanced | Records | Failed | End
def event_of(line: str) -> Event:
    """An event from its line."""
    found: Event = _adapter().validate_python(json.loads(line))
    return found


@cache
def _adapter() -> Any:
    from pydantic import Field, TypeAdapter  # late: only the parent reads events

    return TypeAdapter(Annotated[Event, Field(discriminator="event")])


class Channel:
    """The child's end."""

    def __init__(self, events: IO[str]) -> None:
        self.events = events

    def say(self, event: Event) -> None:
        """Send an event at once."""
        self.events.write(json.dumps(dataclasses.asdict(event)) + "\n")
        self.events.flush()


@contextmanager
def serving() -> Iterator[tuple[str, Channel]]:
    """The job that the parent gave, and the way back; a refusal inside is said, and ends the child."""
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    job = sys.stdin.readline()
    try:
        yield job, channel
    except UserError as error:
        channel.say(Refused(error.message, error.hint))


def failure_of(cell: str, label: str, error: BaseException, hint: str | None = None) -> Failure:
    """A fault as the failure of a cell: the first line of what it says; all of it goes to the log.

    Args:
        label: the cell, for people.
        hint: what to do; None for what the error itself says.
    """
    print("".join(traceback.format_exception(error)), file=sys.stderr)
    if isinstance(error, UserError):
        said, own = error.message, error.hint
    else:
        said, own = (str(error).strip().splitlines() or [type(error).__name__])[0], ""
    return Failure(cell, f"{label}: {said}", own if hint is None else hint)
