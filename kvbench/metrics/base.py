"""A metric: from sums per group to a value. Measuring saves the sums; reporting aggregates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Totals = Mapping[str, Array]
"""Column name -> totals ``[resamples]``, or ``[resamples, bins]`` for a histogram."""


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
    """

    name: str
    value: Callable[[Totals], Array]
    signature: str
    tested: str | None = None
    unit: str = "document"
    has_interval: bool = True
    swapped: bool = False
