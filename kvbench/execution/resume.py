"""What of a plan is on disk already, so that a run goes on where an earlier one, or another process, has come to."""

from __future__ import annotations

from kvbench.execution.run_writer import RunWriter
from kvbench.execution.shards import Shard
from kvbench.planning.quality import Plan
from kvbench.store.records import Cell


def is_whole(writer: RunWriter, plan: Plan) -> bool:
    """Whether a plan is on disk from end to end, so that nothing need be loaded; then the writer knows its tasks."""
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


def is_done(writer: RunWriter, cell: Cell) -> bool:
    """Whether every document of a cell is known to be on disk."""
    info = writer.tasks.get(cell.setting)
    return info is not None and set(info.documents) <= writer.recorded.documents(cell)


def left_of(writer: RunWriter, shard: Shard) -> tuple[dict[str, list[str]], tuple[str, ...]] | None:
    """What is left of a shard.

    Returns:
        Which of its documents are on disk, by cell, and the cells that have failed; None if nothing is left to do.
    """
    failed = {c.key for c in shard.cells if c.key in writer.failed or writer.folder.failure(c) is not None}
    done = {c.key: writer.recorded.documents(c) for c in shard.cells if c.key not in failed}
    if all(set(shard.documents) <= documents for documents in done.values()):
        return None
    return {key: sorted(found.intersection(shard.documents)) for key, found in done.items()}, tuple(sorted(failed))
