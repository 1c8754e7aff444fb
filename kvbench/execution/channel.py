"""What a child says to its parent: events, a JSON line each; whatever else it prints goes to its log."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from kvbench.errors import UserError

FAULTS = (RuntimeError, ValueError, IndexError, MemoryError, UserError)
"""What may go wrong in a cell, and stays in it."""


class Channel:
    """The child's end."""

    def __init__(self, events: IO[str]) -> None:
        self.events = events

    def say(self, event: str, **content: Any) -> None:
        """An event, at once."""
        self.events.write(json.dumps({"event": event, **content}) + "\n")
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
        channel.say("refused", message=error.message, hint=error.hint)


def reason_of(error: BaseException) -> str:
    """The first line of what a fault says, or what it is called; all of it goes to the log."""
    print("".join(traceback.format_exception(error)), file=sys.stderr)
    if isinstance(error, UserError):
        return error.message
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
