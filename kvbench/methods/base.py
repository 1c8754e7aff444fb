"""What a compression method is: a name, an exact ratio, and a layout for a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from kvbench.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from kvbench.methods.layout import Layout


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
class Method(ABC):
    """A compression method with its parameters resolved.

    Subclasses say in their docstring what they hold, which paper they follow and where they
    depart from it.

    Attributes:
        ratio: asked share of entries to remove; 0 for methods that take none.
        options: what ``--set`` gave, by name; every name is in ``option_values``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    takes_ratio: ClassVar[bool] = True
    needs_adapter: ClassVar[bool] = False
    seeded: ClassVar[bool] = False
    position_rule: ClassVar[str] = "absolute"
    option_values: ClassVar[dict[str, tuple[str, ...]]] = {}

    ratio: Fraction = Fraction(0)
    options: dict[str, str] = field(default_factory=dict)

    @abstractmethod
    def layout(self, n: int, rng: np.random.Generator) -> Layout:
        """The layout of a block of ``n`` text tokens; ``rng`` is used by seeded methods only.

        Raises:
            UserError: the ratio is beyond what the method can reach on ``n`` tokens.
        """

    def option(self, name: str) -> str:
        """The value given for an option, or its default (the first allowed value)."""
        return self.options.get(name, self.option_values[name][0])
