"""Which methods are best at a ratio that they were asked for, though they may not remove equally much on average.

Some fill their budget while they read, so that early tokens see more than late ones: two methods that hold the same at
the end of a text can differ threefold in what its tokens saw. Values are then no ranking, and the best are all those
that no other beats with as much removed.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.metrics import SHOWN
from kvbench.store.rows import Row

UNDER_FLOOR = (
    "The full cache itself answers less than half: this model does not solve the task; methods are not ranked by it."
)
NO_USE = (
    "The full cache does not predict reliably better than no context (none), so that nothing tells what removal costs; "
    "methods are not ranked."
)
UNEQUAL = 0.05
"""Difference between mean ratios from which on methods do not remove equally much."""


def loss(row: Row) -> float:
    """A number that is lower for better values; the distance from the full cache if no direction is better."""
    value, better = row.value or 0.0, SHOWN[row.metric].better
    if better is None:
        return abs(row.delta or 0.0)
    return -value if better == "high" else value


def removed_of(row: Row) -> float | None:
    """The share of the cache that was removed: the mean over queries, or for answers when the context had been read;
    None where nobody has measured it."""
    return row.ratio_mean if row.ratio_mean is not None else row.ratio_realised


def removed_or_asked(row: Row) -> float | None:
    """The same, or what was asked for where nobody has measured it."""
    measured = removed_of(row)
    return row.ratio_asked if measured is None else measured


def unranked(rows: Sequence[Row], metric: str) -> str:
    """A sentence if the methods of a task cannot be ranked by a metric; else empty.

    They cannot where the model does not solve the task, or where what is removed is not seen to be worth anything: the
    interval of the difference between no context and the full cache reaches 0.
    """
    if any(row.params.get("under_floor") for row in rows):
        return UNDER_FLOOR
    for row in rows:
        if row.metric == metric and row.name == "none" and row.baseline == "full" and row.delta is not None:
            lost, end = (1, row.delta_ci_low) if SHOWN[metric].better == "low" else (-1, row.delta_ci_high)
            return NO_USE if lost * (row.delta if end is None else end) <= 0 else ""
    return ""


def are_unequal(rows: Sequence[Row]) -> bool:
    """Whether rows of one ratio asked for did not remove equally much."""
    shares = [share for row in rows if (share := removed_or_asked(row)) is not None]
    return bool(shares) and max(shares) - min(shares) > UNEQUAL


def best(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other of them beats with as much removed on average; all that are equal."""
    points = [(row, loss(row), removed_or_asked(row) or 0.0) for row in rows]
    return [
        row for row, lost, share in points
        if not any(less < lost and other > share - UNEQUAL for _, less, other in points)
    ]
