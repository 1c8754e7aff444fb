"""Base classes of metrics: a value from sums per group. Measuring stores the sums; reporting aggregates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Totals = Mapping[str, Array]
"""Column name -> totals ``[resamples]``, or ``[resamples, bins]`` for a histogram."""


LM, ANSWERS, TEXTS, TIMING = "language modelling", "answers", "written text", "time and memory"
"""Names of the tables in files and on pages."""
FLUENCY, MEANING, DEGENERATION = (
    "fluency and overlap with the reference", "meaning and diversity", "length and degeneration"
)
GREEDY = "greedy texts"
"""Names of further tables in the terminal, beside those of language modelling and recall."""


@dataclass(frozen=True)
class Shown:
    """How a metric is shown in tables and figures.

    Attributes:
        heading: heading of the column.
        digits: number of decimals.
        better: ``low`` or ``high`` if such values are better; None if neither is.
        tables: names of the tables that have it as a column.
        label: label of the axis; the heading if empty.
        scale: factor that values are multiplied by.
        is_plotted: whether it is plotted against the ratio.
    """

    heading: str
    digits: int = 2
    better: str | None = None
    tables: tuple[str, ...] = ()
    label: str = ""
    scale: float = 1.0
    is_plotted: bool = False

    @property
    def axis(self) -> str:
        return self.label or self.heading


@dataclass(frozen=True)
class Metric:
    """One number per cell.

    Attributes:
        name: name in the JSON output.
        value: computes ``[resamples]`` from the method's totals.
        tested: column whose difference to ``full`` is tested; None if there is nothing to test.
        unit: what ``n`` counts.
        signature: version and settings, as sacrebleu does for BLEU.
        has_interval: whether resampling makes sense.
        exchange_test: whether the difference to ``full`` is tested by exchanging the two within groups, which suits any
            function of sums.
        shown: how it is shown.
    """

    name: str
    value: Callable[[Totals], Array]
    signature: str
    tested: str | None = None
    unit: str = "document"
    has_interval: bool = True
    exchange_test: bool = False
    shown: Shown = Shown("")
