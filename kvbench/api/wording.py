"""Sentences of the command line, worded for Python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from kvbench.errors import UserError

_OPTION = re.compile(r"--([a-z][a-z-]*)")


@contextmanager
def in_python() -> Iterator[None]:
    """Spell what sentences of the command line name as arguments of Python."""
    try:
        yield
    except UserError as error:
        message, hint = (
            _OPTION.sub(lambda found: found[1].replace("-", "_"), text.replace("--set ", ""))
            for text in (error.message.replace("--ratio ", "ratio="), error.hint)
        )
        raise type(error)(message, hint) from error
