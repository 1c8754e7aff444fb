"""A metric: from sums per group to a value. Measuring saves the sums; reporting aggregates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Totals = Mapping[str, Array]
"""Column name -> totals ``[resamples]``, or ``[resamples, bins]`` for a histogram."""


LM, ANSWERS, TEXTS, TIMING = "language modelling", "answers", "written text", "time and memory"
"""Tables that are written to files and pages."""
FLUENCY, MEANING, DEGENERATION = (
    "fluency and overlap with the reference", "meaning and diversity", "length and degeneration"
)
GREEDY = "greedy texts"
"""Tables of the terminal, beside those of language modelling and recall."""


@dataclass(frozen=True)
class Shown:
    """How a metric is shown, wherever it is.

    Attributes:
        heading: of a column.
        digits: decimals.
        better: ``low`` or ``high`` where one value is better than another; None where it is not.
        tables: those that it is a column of.
        label: of an axis; the heading if empty.
        scale: values are multiplied by it.
        is_drawn: it is drawn against removal.
    """

    heading: str
    digits: int = 2
    better: str | None = None
    tables: tuple[str, ...] = ()
    label: str = ""
    scale: float = 1.0
    is_drawn: bool = False

    @property
    def axis(self) -> str:
        return self.label or self.heading


@dataclass(frozen=True)
class Metric:
    """One number per cell.

    Attributes:
        name: as in the JSON contract.
        value: from the method's totals to ``[resamples]``.
        tested: column whose difference to ``full`` is tested; None if there is nothing to test.
        unit: what ``n`` counts.
        signature: version and settings, as sacrebleu does for BLEU.
        has_interval: whether resampling makes sense.
        swapped: the difference to ``full`` is tested by exchanging the two within groups, which suits any
            function of sums.
        shown: how it is shown.
    """

    name: str
    value: Callable[[Totals], Array]
    signature: str
    tested: str | None = None
    unit: str = "document"
    has_interval: bool = True
    swapped: bool = False
    shown: Shown = Shown("")
