"""Errors for users: the message says what is wrong and where, the hint what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

_MOST_NAMES = 100
"""Allowed names that a message lists at most; of more, it lists the first."""


class UserError(Exception):
    """The request cannot be carried out as given.

    The command line prints the message (and the hint) on stderr and exits with
    ``exit_code`` 2; nothing has been written by then.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed; the hint names the command that installs it."""


class StoppedError(UserError):
    """Measuring had to stop, for example because the disk is full; what was measured before is kept."""

    exit_code = 1


def did_you_mean(given: str, names: Iterable[str], other_names: Mapping[str, str] = MappingProxyType({})) -> str:
    """The question whether the closest of some names is meant, with a space behind it; empty if none is close.

    Args:
        other_names: what is also said -> the name that it stands for, which need not be among ``names``.
    """
    by_lower = {name.lower(): name for name in names}
    meant = other_names.get(given.lower(), "").lower()
    if meant in by_lower:
        return f"Did you mean {by_lower[meant]!r}? "
    near = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.5)
    return f"Did you mean {by_lower[near[0]]!r}? " if near else ""


def unknown(
    what: str, given: str, allowed: Iterable[str], other_names: Mapping[str, str] = MappingProxyType({})
) -> UserError:
    """Create the error for a name that is not in ``allowed``; it suggests the closest match, or what another name
    stands for."""
    names = sorted(allowed)
    guess = did_you_mean(given, names, other_names)
    if len(names) > _MOST_NAMES:
        names = [*names[: _MOST_NAMES // 5], f"and {len(names) - _MOST_NAMES // 5} more"]
    return UserError(f"Unknown {what} {given!r}.", f"{guess}Allowed: {', '.join(names)}.")
