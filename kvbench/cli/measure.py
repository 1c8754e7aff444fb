"""Shared by commands that measure: the command line, and being interrupted, which has an exit code of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer


def command_line() -> list[str]:
    """The command as typed, whatever folder the program lies in."""
    return ["kvbench", *sys.argv[1:]]


@contextmanager
def interruptible() -> Iterator[None]:
    """Leave with exit code 130 if the user interrupts the block.

    Raises:
        typer.Exit: the user has.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
