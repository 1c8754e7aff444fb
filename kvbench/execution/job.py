"""What the parent sends to a child process: one job, then orders to measure parts of it."""

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
    """The cells of one model and seed, and what is needed to measure them.

    Attributes:
        location: model id or path for ``from_pretrained``.
        task_files: task name -> name or path that it is loaded from.
        data: path of the user's own corpus, or None; ``column``: name of its text column, or of that on the hub.
        limit: maximum number of documents per task; 0 for all.
        threads: number of CPU threads of this process; 0 for PyTorch's default.
        judging: the judges of generated texts.
        skip_infeasible: leave out cells that cannot be measured on these documents, instead of refusing the job.
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
    """Documents of one workload, to be measured under every cell of it.

    Attributes:
        done: cell key -> those of the documents that are on disk already.
        failed: keys of cells that are not to be measured.
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
