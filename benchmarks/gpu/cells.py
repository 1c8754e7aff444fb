"""What a cell is: a name, how long it may take, and a function that writes down what it finds as it goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LIMIT = 20.0
"""Seconds after which a cell is cut short."""


class NotHereError(Exception):
    """The cell cannot be had on this machine: why, in a sentence."""


@dataclass(frozen=True)
class Number:
    """Something measured.

    Attributes:
        unit: such as ``ms`` or ``tokens/s``; ``x full`` for times as fast as the full cache in the same run.
        low, high: the range over repeats; None where there was one.
    """

    value: float
    unit: str
    low: float | None = None
    high: float | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON has it: what is not finite is null."""
        found = {"value": self.value, "unit": self.unit, "low": self.low, "high": self.high}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}

    def __str__(self) -> str:
        spread = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        size = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.4g}"
        return f"{size} {self.unit}".strip() + spread


@dataclass
class Found:
    """What a cell has found so far: a cell that is cut short still tells something.

    Attributes:
        is_right: whether what was to hold does.
        says: a sentence beside the numbers, or instead of them.
    """

    numbers: dict[str, Number] = field(default_factory=dict)
    is_right: bool = True
    says: str = ""

    def add(self, name: str, value: float, unit: str, spread: list[float] | None = None) -> None:
        """A number, or one of its name anew; ``spread``: the repeats that it stands for."""
        low, high = (min(spread), max(spread)) if spread else (None, None)
        self.numbers[name] = Number(float(value), unit, low, high)


@dataclass(frozen=True)
class Cell:
    """One thing to try.

    Attributes:
        group: cells with the same kind of numbers, for the table.
        run: given what to fill, and the moment (``time.monotonic``) after which nothing is to be repeated.
        share: seconds for repeating.
    """

    group: str
    name: str
    run: Callable[[Found, float], None]
    share: float = 6.0
    limit: float = LIMIT
