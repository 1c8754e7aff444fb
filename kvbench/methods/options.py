"""Options of a method: typed fields of its class, from which ``--set``, lists, cards and cells follow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvbench.errors import UserError, unknown

_METADATA = "option"
_DIGITS = 18
"""That a number may have."""


@dataclass(frozen=True)
class Option:
    """How an option is given and written down; its value is that of a field.

    Attributes:
        default: the value when nothing is given, as text.
        choices: the allowed words; empty for a whole number.
        least, most: bounds of a number.
        trained: part of what an adapter learns; an adapter trained with another value is refused.
        help: what it does, in a few words.
        kind: type of the value.
    """

    default: str
    choices: tuple[str, ...] = ()
    least: int = 0
    most: int | None = None
    trained: bool = False
    help: str = ""
    kind: type = str

    def value(self, name: str, text: str) -> Any:
        """The value that a text stands for.

        Raises:
            UserError: not an allowed one.
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
        """The one spelling of a value; that of the default for None."""
        if value is None:
            return self.default
        return str(value).lower() if self.kind is bool else str(value)


def option(
    default: str | int | bool | None, help: str, *, choices: tuple[str | int, ...] = (), least: int = 0,
    most: int | None = None, trained: bool = False, usual: int | None = None,
) -> Any:
    """A field of a method that ``--set NAME=VALUE`` gives.

    Args:
        default: a whole number, a word, or whether something is done; None where nothing given means something of
            its own.
        help: what it does, in a few words.
        choices: the allowed values, where not every number is.
        least, most: bounds of a number.
        trained: an adapter learns it, and is refused with another value.
        usual: for a default of None, the number that stands for it where it is written down.
    """
    kind = int if default is None else type(default)
    shown = usual if default is None else default
    words = ("true", "false") if kind is bool else tuple(map(str, choices))
    text = str(shown).lower() if kind is bool else str(shown)
    return dataclasses.field(
        default=default, kw_only=True, metadata={_METADATA: Option(text, words, least, most, trained, help, kind)}
    )


def options_of(kind: type) -> dict[str, Option]:
    """The options of a method's class, by name, those of its parents first."""
    return {field.name: field.metadata[_METADATA] for field in dataclasses.fields(kind) if _METADATA in field.metadata}
