"""Known faults of earlier versions of methods, which reports of old folders mention; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from kvbench.store.records import IMPORTED, Cell
from kvbench.store.source import source_of

GROUP = "kvbench.methods"
"""Entry point group through which other packages add methods."""

FAULTS = {
    ("cam", 1): "merged twice as often as published, with too large shares, under a growing budget",
    ("d2o", 1): "merged by the mean of one removal and head, so that one entry at a time always was",
    ("lorc", 1): "stored entries in full, and its bytes and memory were those of the full cache",
    ("refreshkv", 1): "attended only a part of what follows a compressed prefix",
    ("think", 1): "held up to 4 % more bytes than its budget",
}
"""(method, version) -> what that version did wrong; for our own methods."""

ONLY_WITH = {"think": "budget_bytes"}
"""Method -> option without which its fault has no effect."""


OUTDATED = "outdated"


def fault_of(cell: Cell) -> str | None:
    """Why a cell is outdated; None if it was measured by the current version of its method, or elsewhere."""
    if cell.execution == IMPORTED:
        return None
    known = FAULTS.get((cell.method, cell.version)) if ONLY_WITH.get(cell.method, "") in ("", *cell.options) else None
    if known is not None:
        return known
    version, source = _elsewhere(cell.method)
    if cell.version < version:
        return "its rule has changed since"
    return "its code has changed since" if cell.source and source and cell.source != source else None


def remarks_of(cell: Cell) -> dict[str, Any]:
    """Remarks on a cell's method for its rows: a version above 1, a note, why it is outdated, and its variant."""
    found = {
        "version": cell.version if cell.version > 1 else None, "note": cell.note or None, "outdated": fault_of(cell),
        "variant": cell.variant or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def named(method: str, remarks: Mapping[str, Any]) -> str:
    """Name of a method as shown: with its variant and note, and marked if an earlier version of it was measured.

    Args:
        remarks: parameters of a row, or :func:`remarks_of` a cell.
    """
    if remarks.get("variant"):
        method = f"{method}:{remarks['variant']}"
    found = [remarks["note"]] if remarks.get("note") else []
    found += [OUTDATED] if remarks.get("outdated") else []
    return f"{method} ({', '.join(found)})" if found else method


def faults_in(found: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """One sentence for every outdated method, given pairs of name and remarks."""
    return list(dict.fromkeys(
        f"{OUTDATED}: {method} was measured by version {remarks.get('version', 1)} of its rule, and is wrong ("
        f"{remarks['outdated']}). The command that measured it measures it again."
        for method, remarks in found if remarks.get("outdated")
    ))


def _elsewhere(method: str) -> tuple[int, str]:
    """Version and hash of the code of a method of another package; 1 and "" if there is none."""
    kind = loaded_elsewhere(method)
    try:
        return int(getattr(kind, "version", 1)), source_of(kind) if isinstance(kind, type) else ""
    except Exception:  # whatever the other package says must not prevent a report
        return 1, ""


@cache
def loaded_elsewhere(method: str) -> Any:
    """The class of a method of another package, which is imported for it; None if there is none, or it cannot be."""
    for entry in entry_points(group=GROUP, name=method):
        try:
            return entry.load()
        except Exception:  # whatever the other package raises must not prevent a report
            return None
    return None
