"""What the parent hands to the child: a job once, and orders to carry out parts of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import ClassVar

from kvbench.data.rows import TEXT
from kvbench.judges.choice import JudgeChoice
from kvbench.store.records import Cell


@dataclass(frozen=True)
class Job:
    """Cells of one model and seed, and where to find things.

    Attributes:
        location: what ``from_pretrained`` takes.
        task_files: task name -> name or path that it is loaded by.
        data: the user's own corpus, or None; ``column`` what the text is called in it, or in the hub's.
        limit: documents per task, 0 for all.
        threads: CPU threads of this child, 0 for PyTorch's choice.
        judging: what judges the texts that are written.
        skip_infeasible: leave out what a method cannot do with these documents, instead of refusing all.
    """

    module: ClassVar[str] = "kvbench.execution.worker"

    cells: tuple[Cell, ...]
    location: str
    task_files: dict[str, str]
    data: str | None
    limit: int
    threads: int
    judging: JudgeChoice = field(default_factory=JudgeChoice)
    skip_infeasible: bool = False
    column: str = TEXT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        raw = json.loads(text)
        raw["cells"] = tuple(Cell(**cell) for cell in raw["cells"])
        raw["judging"] = JudgeChoice.load(raw["judging"])
        return cls(**raw)


@dataclass(frozen=True)
class Order:
    """Documents of one workload to measure under every cell of it.

    Attributes:
        done: cell key -> documents of these that are on disk.
        failed: keys of the cells to leave alone.
    """

    workload: str
    documents: tuple[str, ...]
    done: dict[str, list[str]]
    failed: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        raw = json.loads(text)
        return cls(raw["workload"], tuple(raw["documents"]), raw["done"], tuple(raw["failed"]))
