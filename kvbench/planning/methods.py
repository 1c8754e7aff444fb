"""Expands the methods of a request: one entry per ratio or one at a budget, with controls and baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvbench.errors import UserError, unknown
from kvbench.methods import METHODS, Method, make_method, unknown_method
from kvbench.parsing import parse_bytes
from kvbench.planning.adapters import Entry

CONTROLS, BASELINES = ("full", "none"), ("local", "scattered", "sinks")
ANY_LENGTH = 1 << 40
"""Text length for checks that are made before the documents are cut, when the length is unknown."""


@dataclass(frozen=True)
class Budget:
    """How much of the cache to keep, if not given as a ratio of entries.

    Attributes:
        tokens: entries to keep per layer and head of a text; 0 if not given.
        bytes: bytes to keep of the cache of a text; 0 if not given.
        equal: whether ratios are of bytes, for methods that make entries smaller instead of fewer.
    """

    tokens: int = 0
    bytes: int = 0
    equal: bool = False

    @property
    def is_constant(self) -> bool:
        return bool(self.tokens or self.bytes)

    @property
    def label(self) -> str:
        """The budget in the name of a folder; empty if ratios are used."""
        if self.is_constant:
            return f"{self.tokens}tokens" if self.tokens else f"{self.bytes}bytes"
        return ""

    @property
    def options(self) -> dict[str, str]:
        """The budget as options of a cell."""
        given = {"budget_tokens": self.tokens, "budget_bytes": self.bytes}
        return {name: str(value) for name, value in given.items() if value} | ({"fit": "bytes"} if self.equal else {})


NO_BUDGET = Budget()


def parse_budget(tokens: int | None, size: str | None, equal: bool, ratios: Sequence[str]) -> Budget:
    """Parse the budget from the options of a command.

    Raises:
        UserError: it is not above 0, or conflicts with another option.
    """
    given = [("--budget-tokens", tokens), ("--budget-bytes", size), ("--ratio", ratios), ("--equal-bytes", equal)]
    said = [option for option, value in given if value not in (None, False, (), [])]
    if len(said) > 1 and ("--budget-tokens" in said or "--budget-bytes" in said):
        raise UserError(f"{said[0]} and {said[1]} both say how much is kept.", "Leave one of them out.")
    if tokens is not None and tokens < 1:
        raise UserError(f"--budget-tokens {tokens} is below 1.", "It is the entries kept per layer and head.")
    return Budget(tokens or 0, parse_bytes(size, "--budget-bytes") if size is not None else 0, equal)


@dataclass(frozen=True)
class Choice:
    """A method as requested.

    Attributes:
        given: options of its own, as name and value; they override options given to all methods.
    """

    name: str
    given: tuple[tuple[str, str], ...] = ()

    @property
    def options(self) -> dict[str, str]:
        return dict(self.given)

    def variant(self, to_all: Mapping[str, str]) -> str:
        """Its own options that change a value, such as ``window=16,pool=mean``.

        Args:
            to_all: options that are given to all methods.
        """
        found = []
        for key, option in METHODS[self.name].options().items():
            usual = option.text(option.value(key, to_all[key])) if key in to_all else option.default
            if self.options.get(key, usual) != usual:
                found.append(f"{key}={self.options[key]}")
        return ",".join(found)


def parse_choice(text: str) -> Choice:
    """Parse a method as given on the command line: ``snapkv``, or ``snapkv:window=16,pool=mean``.

    Raises:
        UserError: the method, one of its options, or a value does not exist.
    """
    name, colon, rest = text.partition(":")
    if name not in METHODS:
        raise unknown_method(name)
    known, given = METHODS[name].options(), {}
    if colon and not known:
        raise UserError(f"--method {text}: {name} has no options.", f"Write --method {name}.")
    for pair in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(
                f"--method {text}: {pair!r} is not of the form key=value.",
                f"Write --method {name}:key=value,key=value.",
            )
        if key not in known:
            raise unknown(f"option of {name}", key, known)
        try:
            given[key] = known[key].text(known[key].value(key, value))
        except UserError as error:  # its message is worded for --set
            raise UserError(error.message.replace("--set ", f"--method {name}:"), error.hint) from None
    return Choice(name, tuple(given.items()))


def entries_of(
    asked: Sequence[Choice], ratios: Sequence[Fraction], budget: Budget, options: dict[str, str],
    baselines: Sequence[str], in_chunks: bool,
) -> list[Entry]:
    """Expand methods into entries: controls, baselines, then the requested ones, once per ratio or at the budget.

    Args:
        baselines: names of methods that others are compared with.
        in_chunks: whether the text comes in chunks of its own, such as the turns of a dialogue.

    Raises:
        UserError: a requested method cannot be given the budget.
    """
    names = [choice.name for choice in asked]
    if budget.is_constant and in_chunks:
        raise UserError("A text that comes in chunks has no budget of its own.", "Give a --ratio instead.")
    wanted: list[tuple[Choice, str]] = [(Choice("full"), "control")]
    if "none" in names or (baselines and not in_chunks):
        wanted += [(Choice("none"), "control")]
    if baselines and not in_chunks and any(METHODS[name].compresses() for name in names):
        wanted += [(Choice(name), "baseline") for name in baselines if name not in names]
    wanted += [(choice, "method") for choice in asked if choice.name not in CONTROLS]
    found = [
        Entry(method, role, variant=choice.variant(options)) for choice, role in wanted
        for method in _methods(choice, ratios, budget, options, in_chunks)
        if role != "baseline" or not budget.tokens or budget.tokens >= method.minimum
    ]
    return list({(entry.method.name, entry.method): entry for entry in reversed(found)}.values())[::-1]


def _methods(
    choice: Choice, ratios: Sequence[Fraction], budget: Budget, options: dict[str, str], in_chunks: bool
) -> list[Method]:
    name, options = choice.name, {**options, **choice.options}
    kind, given = METHODS[name], {**options, **budget.options}
    if budget.is_constant and "budget" in options:
        said = f"--budget-{'tokens' if budget.tokens else 'bytes'}"
        other = f"--set budget={options['budget']}"
        raise UserError(f"{said} and {other} both say what is kept.", "Leave one of them out.")
    if budget.is_constant and name not in CONTROLS:
        unit = "tokens" if budget.tokens else "bytes"
        others = [other for other in kind.budgets if other != "ratio"]
        if unit not in others:
            raise UserError(
                f"{name} cannot be given a budget in {unit}.",
                f"It takes one in {others[0]}." if others else "Leave it out.",
            )
        return [make_method(name, Fraction(0), given)]
    with_ratio = make_method(name, Fraction(0), given).uses_ratio(in_chunks)
    return [make_method(name, ratio, given) for ratio in (dict.fromkeys(ratios) if with_ratio else [Fraction(0)])]


def feasible(
    entries: Sequence[Entry], budget: Budget, in_chunks: bool, omitted: list[str] | None
) -> list[Entry]:
    """Keep the entries that are feasible on long enough texts; add the reasons for leaving out others to ``omitted``.

    Raises:
        UserError: an entry is infeasible and ``omitted`` is None, or a method is infeasible at every ratio.
    """
    found: list[Entry] = []
    reasons: dict[str, UserError] = {}
    for entry in entries:
        method = entry.method
        try:
            if budget.equal and method.compresses() and "bytes" not in method.budgets:
                raise UserError(
                    f"{method.name} cannot be set to a number of bytes, as --equal-bytes asks.", "Leave it out."
                )
            method.check(ANY_LENGTH, in_chunks)
        except UserError as error:
            if omitted is None:
                raise
            reasons[method.name] = error
            omitted.append(error.message)
        else:
            found.append(entry)
    for name, reason in reasons.items():
        if not any(entry.method.name == name for entry in found):
            raise reason
    return found
