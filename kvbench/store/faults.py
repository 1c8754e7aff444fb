"""What was wrong with earlier versions of methods, so that reports of old folders can say it; without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from kvbench.store.records import Cell

GROUP = "kvbench.methods"
"""The entry points that methods of other packages are found by."""

FAULTS = {
    ("cam", 1): "merged twice as often as published, with too large shares, under a growing budget",
    ("d2o", 1): "merged by the mean of one removal and head, so that one entry at a time always was",
    ("refreshkv", 1): "attended only a part of what follows a compressed prefix",
    ("think", 1): "held up to 4 % more bytes than its budget",
}
"""Of our methods: what every version before the present one did wrong."""

ONLY_WITH = {"think": "budget_bytes"}
"""The option without which a method's fault shows in nothing."""


OUTDATED = "outdated"


def fault_of(cell: Cell) -> str | None:
    """Why a cell is outdated; None if it was measured by the present version of its method."""
    known = FAULTS.get((cell.method, cell.version)) if ONLY_WITH.get(cell.method, "") in ("", *cell.options) else None
    if known is not None or cell.version >= _version_elsewhere(cell.method):
        return known
    return "its rule has changed since"


def remarks_of(cell: Cell) -> dict[str, Any]:
    """What the rows of a cell say besides its numbers: a version above 1, what the method notes, and its fault."""
    found = {
        "version": cell.version if cell.version > 1 else None, "note": cell.note or None, "outdated": fault_of(cell),
        "variant": cell.variant or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def named(method: str, remarks: Mapping[str, Any]) -> str:
    """A method as it is shown: with what it notes, and marked if it was measured by an earlier version of its rule.

    Args:
        remarks: parameters of a row, or :func:`remarks_of` a cell.
    """
    if remarks.get("variant"):
        method = f"{method}:{remarks['variant']}"
    found = [remarks["note"]] if remarks.get("note") else []
    found += [OUTDATED] if remarks.get("outdated") else []
    return f"{method} ({', '.join(found)})" if found else method


def faults_in(found: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A sentence on every method, of its name and remarks, that is outdated."""
    return list(dict.fromkeys(
        f"{OUTDATED}: {method} was measured by version {remarks.get('version', 1)} of its rule, and is wrong ("
        f"{remarks['outdated']}). The command that measured it measures it again."
        for method, remarks in found if remarks.get("outdated")
    ))


@cache
def _version_elsewhere(method: str) -> int:
    """The version of a method of another package, which has to be loaded for it; 1 if there is none."""
    for entry in entry_points(group=GROUP, name=method):
        try:
            return int(entry.load().version)
        except Exception:  # whatever the other package raises: a report is made all the same
            return 1
    return 1
