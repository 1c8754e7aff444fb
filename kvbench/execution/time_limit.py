"""Measures as many documents as fit into a given time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console

from kvbench.execution.estimate import estimate_seconds, expected
from kvbench.parsing import duration_of
from kvbench.planning.quality import Plan
from kvbench.store.folder import RunFolder

GROWTH = 8
"""How many times as many documents as before are measured in the next round, at most: first times are uncertain."""
RESERVE = 0.85
"""Share of the time left that a round may take by its estimate."""


def measure_within(
    plans: Sequence[Plan], folder: RunFolder, seconds: float, measure: Callable[[Sequence[Plan]], None],
    console: Console, fresh: bool, fail_fast: bool,
) -> int:
    """Measure the plans on more and more documents per task, in rounds, until the next would take too long.

    One more document is measured in any case. What is on disk already takes no time, so that the same call again adds
    to it.

    Args:
        seconds: for all rounds together.
        measure: measures plans; documents that are on disk are not measured again.
        fresh: whether the first round measures again what is on disk; ``fail_fast``: whether it ends at a failure.

    Returns:
        Documents per task.
    """
    started = time.monotonic()
    most = max(expected(plan, cell) for plan in plans for cell in plan.cells)
    count = 0 if fresh else _on_disk(plans, folder, most)
    wanted = min(most, count + 1)
    if count:
        console.print(
            f"{count} of {most} documents per task are on disk; as many more as fit are measured now.", highlight=False
        )
    while True:
        begun, known = time.monotonic(), count > 0
        new = wanted - count
        predicted = new * _seconds_each(plans, folder, count) if new and known else 0.0
        measure([_limited(plan, wanted) for plan in plans])
        took, count = time.monotonic() - begun, wanted
        if fail_fast and any(folder.failure(cell) for plan in plans for cell in plan.cells):
            return _on_disk(plans, folder, most)
        each = _seconds_each(plans, folder, count)
        # What a round takes besides documents, such as loading the model.
        overhead = max(0.0, took - (predicted if known else new * each))
        left = RESERVE * (seconds - (time.monotonic() - started)) - overhead
        wanted = min(most, GROWTH * count, count + int(left / max(each, 1e-9)) if left > 0 else count)
        if wanted <= count:
            break
    used = time.monotonic() - started
    console.print(
        f"{count} of {most} documents per task in {duration_of(used)}, of {duration_of(seconds)} that were allowed; "
        "the same command again adds more." if count < most else f"All {most} documents per task fitted.",
        highlight=False,
    )
    return count


def _limited(plan: Plan, count: int) -> Plan:
    return replace(plan, request=replace(plan.request, limit=count))


def _on_disk(plans: Sequence[Plan], folder: RunFolder, most: int) -> int:
    """Number of documents per task that all cells have records of, but those that have failed."""
    cells = [(plan, cell) for plan in plans for cell in plan.cells if folder.failure(cell) is None]
    done = ((plan, cell, len(folder.documents(cell))) for plan, cell in cells)
    return min((most if count >= expected(plan, cell) else count for plan, cell, count in done), default=0)


def _seconds_each(plans: Sequence[Plan], folder: RunFolder, count: int) -> float:
    """Estimated seconds that another document per task takes, after ``count`` of them."""
    costs = [estimate_seconds(_limited(plan, count + 1), folder) for plan in plans]
    return sum(cost or 0.0 for some in costs for cost in some.values())
