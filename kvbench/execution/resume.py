"""Determines what of a plan is on disk already, so that a run continues where an earlier or another one stopped."""

from __future__ import annotations

from kvbench.execution.run_writer import RunWriter
from kvbench.execution.shards import Shard
from kvbench.planning.quality import Plan
from kvbench.store.records import Cell


def is_complete(writer: RunWriter, plan: Plan) -> bool:
    """Whether a plan is completely on disk, so that no model need be loaded; if so, fill in the writer's tasks and
    probes."""
    earlier = writer.earlier
    settings = {cell.setting for cell in plan.cells}
    if earlier is None or not earlier.describes(writer.content, writer.limit):
        return False
    if plan.model.name not in earlier.probes or not settings <= set(earlier.tasks):
        return False
    for cell in plan.cells:
        try:
            missing = set(earlier.tasks[cell.setting].documents) - writer.recorded.documents(cell)
        except (ValueError, KeyError, TypeError):
            return False
        if missing or writer.folder.failure(cell) is not None:
            return False
    writer.tasks |= {setting: earlier.tasks[setting] for setting in settings}
    writer.probes[plan.model.name] = earlier.probes[plan.model.name]
    writer.opened = True
    return True


def found_on_disk(writer: RunWriter, plan: Plan) -> str:
    """What of a plan is on disk, and what is not, in words; empty if nothing is.

    Cells that have failed already, such as those that are left out, do not count.
    """
    cells = [cell for cell in plan.cells if cell.key not in writer.failed]
    wanted = {setting: set(writer.tasks[setting].documents) for setting in {cell.setting for cell in cells}}
    total = sum(len(wanted[cell.setting]) for cell in cells)
    found = sum(len(wanted[cell.setting] & writer.recorded.documents(cell)) for cell in cells)
    if found == total:
        return f"All {total} records are on disk." if total else ""
    return f"{found} of {total} records are on disk, {total - found} are measured now." if found else ""


def is_done(writer: RunWriter, cell: Cell) -> bool:
    """Whether all documents of a cell are on disk; False as long as the documents are unknown."""
    info = writer.tasks.get(cell.setting)
    return info is not None and set(info.documents) <= writer.recorded.documents(cell)


def remaining(writer: RunWriter, shard: Shard) -> tuple[dict[str, list[str]], tuple[str, ...]] | None:
    """Determine what is left to measure of a shard.

    Returns:
        Its documents that are on disk, by cell key, and the keys of failed cells; None if nothing is left.
    """
    failed = {c.key for c in shard.cells if c.key in writer.failed or writer.folder.failure(c) is not None}
    done = {c.key: writer.recorded.documents(c) for c in shard.cells if c.key not in failed}
    if all(set(shard.documents) <= documents for documents in done.values()):
        return None
    return {key: sorted(found.intersection(shard.documents)) for key, found in done.items()}, tuple(sorted(failed))
