"""The largest ratio without significant loss: a number of a method, not of a cell."""

from __future__ import annotations

from kvbench.metrics.base import Shown

LARGEST_RATIO = "largest_ratio"
LARGEST_RATIO_SIGNATURE = "largest measured ratio, no significant loss there or at a smaller one|v:1"
LARGEST_RATIO_SHOWN = Shown("largest ratio without significant loss", 2, "high")
