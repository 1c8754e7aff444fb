"""The job that the parent gives to a profiling child process."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

from kvbench.store.records import Cell

TIME, MEMORY, PROBE = "time", "memory", "probe"
ROUNDS = 4
"""Default number of rounds; fewer if they are slow."""


@dataclass(frozen=True)
class ProfileJob:
    """Cells that are profiled in one process.

    Attributes:
        kind: ``time`` for all cells in turn; ``memory`` or ``probe`` for a single one.
        location: model id or path for ``from_pretrained``, or ``shape:NAME``.
        positions: number of positions that the longest text of the run needs.
        repeat: index of the process.
        rounds, warmups: timed requests of each cell, and the most warm-up requests before them.
        budget: bytes that a probe may use; 0 for what is free.
    """

    module: ClassVar[str] = "kvbench.profiling.worker"

    kind: str
    cells: tuple[Cell, ...]
    location: str
    positions: int
    threads: int
    repeat: int = 0
    rounds: int = 0
    warmups: int = 0
    budget: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ProfileJob:
        raw = json.loads(text)
        raw["cells"] = tuple(Cell(**cell) for cell in raw["cells"])
        return cls(**raw)
