"""What a compression method is: a name, an exact ratio, and options."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from kvbench.errors import UserError, unknown

if TYPE_CHECKING:
    import numpy as np

    from kvbench.cache.shape import CacheShape
    from kvbench.methods.layouts.layout import Layout
    from kvbench.methods.layouts.mask_example import Mask


TRAINED_PERCENT = (5, 95)
"""Ratios that training draws from, in per cent."""


def parse_ratio(text: str | float) -> Fraction:
    """The asked share of entries to remove, as an exact decimal in [0, 1).

    Raises:
        UserError: not a number, or outside the interval.
    """
    try:
        ratio = Fraction(Decimal(str(text)))
    except (ArithmeticError, ValueError):
        raise UserError(
            f"--ratio {text!s} is not a number.", "Give the share to remove, such as 0.7."
        ) from None
    if not 0 <= ratio < 1:
        raise UserError(
            f"--ratio {text!s} is outside [0, 1).",
            "It is the share of cache entries that is removed: 0.7 keeps 30 %.",
        )
    return ratio


def ratio_text(ratio: Fraction) -> str:
    """The ratio as its shortest exact decimal, such as ``0.7``."""
    exact = Decimal(ratio.numerator) / Decimal(ratio.denominator)
    return f"{exact.normalize():f}"


def kept(n: int, ratio: Fraction, min_keep: int = 1) -> int:
    """Entries held after ``n`` text tokens: ``max(min_keep, n - floor(ratio * n))``, exactly."""
    return max(min_keep, n - (ratio.numerator * n) // ratio.denominator)


@dataclass(frozen=True)
class Option:
    """A ``--set`` key of a method: one of some words, or a whole number.

    Attributes:
        default: the value when nothing is given, as text.
        choices: the allowed words; empty for a number.
        least, most: bounds of a number.
        trained: part of what an adapter learns; an adapter trained with another value is refused.
    """

    default: str
    choices: tuple[str, ...] = ()
    least: int = 0
    most: int | None = None
    trained: bool = False

    def parsed(self, name: str, value: str) -> str:
        """The value in its one spelling.

        Raises:
            UserError: not an allowed value.
        """
        if self.choices:
            if value not in self.choices:
                raise unknown(f"value for --set {name}=", value, self.choices)
            return value
        bounds = f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}"
        if not value.isdecimal() or int(value) < self.least or int(value) > (self.most or int(value)):
            raise UserError(f"--set {name}={value}: not a whole number of {bounds}.")
        return str(int(value))


@dataclass(frozen=True)
class Method(ABC):
    """A compression method with its parameters resolved.

    Subclasses say in their docstring what they hold, which paper they follow and where they
    depart from it.

    Attributes:
        ratio: asked share of entries to remove; 0 for methods that take none.
        options: what ``--set`` gave, by name; every name is in ``known``.
        budget_tokens, budget_bytes: entries, or bytes of a text's cache, to keep instead of a share; 0 for none.
        version: of the rule. What was measured by another is not found again, and reports say that it is outdated.
        note: what rows say behind the name.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    version: ClassVar[int] = 1
    note: ClassVar[str] = ""
    takes_ratio: ClassVar[bool] = True
    compresses: ClassVar[bool] = True
    takes_budget: ClassVar[tuple[str, ...]] = ("tokens", "bytes")
    needs_adapter: ClassVar[bool] = False
    seeded: ClassVar[bool] = False
    removes: ClassVar[bool] = True
    executions: ClassVar[tuple[str, ...]] = ("streamed",)
    position_rule: ClassVar[str] = "absolute"
    known: ClassVar[dict[str, Option]] = {}
    trainable: ClassVar[tuple[str, ...]] = ()

    ratio: Fraction = Fraction(0)
    options: dict[str, str] = field(default_factory=dict)
    budget_tokens: int = 0
    budget_bytes: int = 0

    def check(self, longest: int, in_chunks: bool) -> None:  # noqa: B027  # most methods have nothing to check
        """See that the method can be used on text of that many tokens.

        Args:
            in_chunks: the text comes in chunks of its own.

        Raises:
            UserError: it cannot, and why.
        """

    @property
    def minimum(self) -> int:
        """Entries without which the method cannot work."""
        return 1

    def check_kept(self, n: int) -> None:  # noqa: B027  # most methods can do with any ratio
        """See that what the ratio keeps of a text of ``n`` tokens is enough for the method to be what it is called.

        Raises:
            UserError: it is not.
        """

    def ratio_of_bytes(self, n: int, shape: CacheShape) -> Fraction:
        """The share of the bytes of ``n`` entries that is to be removed."""
        if not self.budget_bytes:
            return self.ratio
        return max(Fraction(0), 1 - Fraction(self.budget_bytes, n * shape.entry_bytes))

    def fitted(self, n: int, shape: CacheShape) -> Method:
        """The method for a text of ``n`` tokens, its budget turned into what it works with.

        Raises:
            UserError: the budget, or what the ratio keeps, is below what the method needs.
        """
        if not (self.budget_tokens or self.budget_bytes):
            self.check_kept(n)
            return self
        tokens = self.budget_tokens or self.budget_bytes // shape.entry_bytes
        if tokens < self.minimum:
            given = f"--budget-tokens {tokens}" if self.budget_tokens else (
                f"--budget-bytes {self.budget_bytes}, which is {tokens} entries of {shape.entry_bytes} bytes,"
            )
            needed = self.minimum if self.budget_tokens else self.minimum * shape.entry_bytes
            raise UserError(
                f"{given} is below the {self.minimum} entries that {self.name} needs.", f"Give at least {needed}."
            )
        return replace(
            self, ratio=max(Fraction(0), Fraction(n - tokens, n)), budget_tokens=tokens, budget_bytes=0
        )

    @classmethod
    def uses_ratio(cls, options: Mapping[str, str], in_chunks: bool) -> bool:
        """Whether a ratio decides what is removed; ``in_chunks``: the text comes in chunks of its own."""
        return cls.takes_ratio

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        """What an adapter reads a text of ``n`` tokens under in a step of its training.

        Raises:
            UserError: the method trains nothing.
        """
        raise UserError(f"{cls.name} has nothing that could be trained.")

    def check_text(self, n: int, prefix: int, seed: int) -> None:  # noqa: B027  # most methods take any text
        """See that the method can be used on a text of ``n`` tokens that are written from ``prefix`` on.

        Raises:
            UserError: it cannot, and why.
        """

    def mask_example(self, seed: int) -> Mask | None:
        """A picture of who sees whom in a short text; None where that is not known beforehand."""
        return None

    def option(self, name: str) -> str:
        """The value given for an option, or its default."""
        option = self.known[name]
        return option.parsed(name, self.options[name]) if name in self.options else option.default

    def number(self, name: str) -> int:
        return int(self.option(name))

    @property
    def resolved(self) -> dict[str, str]:
        """All options that take part, with their values."""
        return {name: self.option(name) for name in self.known}

    @property
    def rule_version(self) -> int:
        """The version of the rule that this request is measured by."""
        return self.version

    @property
    def budget_given(self) -> dict[str, str]:
        """The budget as options of a cell, if there is one."""
        given = {"budget_tokens": self.budget_tokens, "budget_bytes": self.budget_bytes}
        return {name: str(value) for name, value in given.items() if value}

    @property
    def by_text(self) -> bool:
        """Whether the layout depends on the words of the text, so that every piece has its own."""
        return False

    @property
    def places_after(self) -> int:
        """Positions that special tokens may take beyond the last one of the text."""
        return 0

    @property
    def unrotates(self) -> bool:
        """Whether keys are turned back to be averaged, which not every model allows."""
        return "merge_at" in self.known and self.option("merge_at") == "unrotated"

    @property
    def n_rows(self) -> int:
        """Embedding rows that the method's adapter trains."""
        return 0

    @property
    def trained_options(self) -> dict[str, str]:
        """The options that an adapter of this method is bound to."""
        return {name: self.option(name) for name, option in self.known.items() if option.trained}
