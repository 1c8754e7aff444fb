"""Shared by commands that measure: being interrupted has an exit code of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


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
