"""Shards: a plan split into groups of a few documents of one workload, under every method and ratio.

A process takes one shard at a time, so that several processes, on one machine or many, can share a run, and so
that the full cache of a document is measured once for all methods that are compared with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from filelock import FileLock, Timeout

from kvbench.store.folder import RunFolder
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Cell

FEW, MANY = 8, 16
"""Number of documents per shard; ``MANY`` if there are at least 256. Batches are formed within a shard; on a CPU,
shards of 8 documents are 4 % slower than shards of 64."""


@dataclass(frozen=True)
class Shard:
    """Documents that are measured together.

    Attributes:
        name: the same for the same shard in every process that shares the folder.
        tokens: tokens of its documents, times the number of cells.
    """

    name: str
    workload: str
    documents: tuple[str, ...]
    cells: tuple[Cell, ...]
    tokens: int

    @property
    def records(self) -> int:
        """Number of records that it has when it is done."""
        return len(self.documents) * len(self.cells)


def split_into_shards(cells: Sequence[Cell], tasks: dict[str, TaskInfo]) -> list[Shard]:
    """Split a plan into shards, in order.

    Args:
        cells: cells of one model and seed.
        tasks: workload -> how it was cut.
    """
    found = []
    for workload, info in tasks.items():
        mine = tuple(cell for cell in cells if cell.workload == workload)
        documents, lengths = info.documents, info.lengths
        size = MANY if len(documents) >= 256 else FEW
        for start in range(0, len(documents), size):
            names = documents[start : start + size]
            key = hashlib.sha256(json.dumps((mine[0].setting, *names)).encode()).hexdigest()[:16]
            tokens = sum(lengths[start : start + size]) * len(mine)
            found.append(Shard(key, workload, names, mine, tokens))
    return found


class ShardLocks:
    """The shards that this process has locked."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.held: dict[str, FileLock] = {}

    def take(self, name: str) -> bool:
        """Lock a shard; returns False if another process has locked it, or this one already has."""
        if name in self.held:
            return False
        lock = self.folder.lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self.held[name] = lock
        return True

    def release(self, name: str) -> None:
        self.held.pop(name).release()

    def release_all(self) -> None:
        for name in list(self.held):
            self.release(name)
