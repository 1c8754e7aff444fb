"""Sentences of the command line, worded for Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvbench.errors import UserError


@contextmanager
def in_python() -> Iterator[None]:
    """Spell what sentences of the command line name as arguments of Python."""
    try:
        yield
    except UserError as error:
        message, hint = (
            text.replace("--set ", "").replace("--budget-tokens ", "budget_tokens=").replace("--ratio ", "ratio=")
            for text in (error.message, error.hint)
        )
        raise type(error)(message, hint) from error
