"""How long a method's greedy text equals that of the full cache: share of tokens before the first difference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from kvbench.metrics.base import DEGENERATION, TEXTS, Shown
from kvbench.metrics.texts import Sample, text_mean
from kvbench.store.records import Output

GREEDY = "greedy"


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens before the first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _match(output: Output, sample: Sample) -> float | None:
    if output.decode != GREEDY or not sample.full:
        return None
    theirs = sample.full[output.draw].ids
    longest = max(len(output.ids), len(theirs))
    return common_prefix(output.ids, theirs) / longest if longest else 1.0


PREFIX_MATCH = text_mean(
    "prefix_match", "greedy tokens before the first that differs from full's/all|v:1", _match,
    Shown("greedy match", 2, None, (TEXTS, DEGENERATION)),
)
