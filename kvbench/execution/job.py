"""What the parent hands to the child."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from kvbench.store.records import Cell


@dataclass(frozen=True)
class Job:
    """Cells of one model, and where to find and put things.

    Attributes:
        location: what ``from_pretrained`` takes.
        task_files: task name -> name or path that it is loaded by.
        data: the user's own corpus, or None.
        limit: documents per task, 0 for all.
        threads: CPU threads of this child, 0 for PyTorch's choice.
        shard, shards: this child measures every ``shards``-th document, from ``shard`` on.
    """

    cells: tuple[Cell, ...]
    location: str
    task_files: dict[str, str]
    data: str | None
    limit: int
    threads: int
    shard: int
    shards: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        raw = json.loads(text)
        raw["cells"] = tuple(Cell(**cell) for cell in raw["cells"])
        return cls(**raw)
