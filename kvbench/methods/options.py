"""Options of methods: typed dataclass fields, which define ``--set``, listings, adapter cards and cells."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvbench.errors import UserError, unknown

_METADATA = "option"
_DIGITS = 18
"""Largest number of digits of an integer."""


@dataclass(frozen=True)
class Option:
    """How an option is parsed and printed; its value is that of the field.

    Attributes:
        default: default value, as text.
        choices: allowed values; empty for an integer.
        least: smallest allowed integer.
        most: largest allowed integer; None if there is no bound.
        trained: whether an adapter is bound to the value that it was trained with; any other is refused.
        help: what it does, in a few words.
        kind: type of the value.
        later: whether a release added it to a method that was there before: at its default it is left out of cells, so
            that results from before it are still found.
    """

    default: str
    choices: tuple[str, ...] = ()
    least: int = 0
    most: int | None = None
    trained: bool = False
    help: str = ""
    kind: type = str
    later: bool = False

    def value(self, name: str, text: str) -> Any:
        """Parse a value.

        Raises:
            UserError: the value is not allowed.
        """
        if self.choices:
            if text not in self.choices:
                raise unknown(f"value for --set {name}=", text, self.choices)
            return text == "true" if self.kind is bool else self.kind(text)
        bounds = f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}"
        is_number = text.isdecimal() and len(text) <= _DIGITS
        if not is_number or int(text) < self.least or int(text) > (self.most or int(text)):
            raise UserError(f"--set {name}={text[:2 * _DIGITS]}: not a whole number of {bounds}.")
        return int(text)

    def text(self, value: Any) -> str:
        """The canonical spelling of a value; that of the default for None."""
        if value is None:
            return self.default
        return str(value).lower() if self.kind is bool else str(value)


def option(
    default: str | int | bool | None, help: str, *, choices: tuple[str | int, ...] = (), least: int = 0,
    most: int | None = None, trained: bool = False, usual: int | None = None, later: bool = False,
) -> Any:
    """Declare a field of a method that ``--set NAME=VALUE`` sets.

    Args:
        default: an integer, a word or a bool; None if leaving the option out has a meaning of its own.
        help: what it does, in a few words.
        choices: allowed values, if not every integer is allowed.
        least: smallest allowed integer.
        most: largest allowed integer; None if there is no bound.
        trained: whether an adapter is bound to the value that it was trained with.
        usual: for a default of None, the number that is printed in its place.
        later: whether it was added to a method that had been released without it.
    """
    kind = int if default is None else type(default)
    shown = usual if default is None else default
    words = ("true", "false") if kind is bool else tuple(map(str, choices))
    text = str(shown).lower() if kind is bool else str(shown)
    return dataclasses.field(
        default=default, kw_only=True,
        metadata={_METADATA: Option(text, words, least, most, trained, help, kind, later)},
    )


def options_of(kind: type) -> dict[str, Option]:
    """The options of a method class by name, inherited ones first."""
    return {field.name: field.metadata[_METADATA] for field in dataclasses.fields(kind) if _METADATA in field.metadata}
