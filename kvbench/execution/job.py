"""What the parent hands to the child: a job once, and orders to carry out parts of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kvbench.corpora.rows import TEXT
from kvbench.models.references import ModelReference
from kvbench.store.records import Cell

NOTHING, ITSELF, SENTENCES = "none", "itself", "encoder"
ENCODER = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Judging:
    """What the user asked of the judges.

    Attributes:
        scorer: name of the language model that fluency is measured with; ``itself`` for the
            uncompressed model that is measured, ``none`` for no fluency.
        encoder: whether texts are turned into vectors.
        features: what MAUVE compares: ``encoder`` (those vectors), or the name of a causal language
            model whose last states it takes; ``none`` for no MAUVE.
        mauve_asked: it was asked for by name, so that too few documents are an error.
        models: the language models among them, by name: those that the cells' options name.
    """

    scorer: str = NOTHING
    encoder: bool = False
    features: str = NOTHING
    mauve_asked: bool = False
    models: dict[str, ModelReference] = field(default_factory=dict)

    @classmethod
    def load(cls, raw: dict[str, Any]) -> Judging:
        """From what ``dataclasses.asdict`` made of it."""
        return cls(**{**raw, "models": {name: ModelReference(**model) for name, model in raw["models"].items()}})


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
        omit: what a method cannot do with these documents is left out, and is no reason to refuse the others.
    """

    module: ClassVar[str] = "kvbench.execution.worker"

    cells: tuple[Cell, ...]
    location: str
    task_files: dict[str, str]
    data: str | None
    limit: int
    threads: int
    judging: Judging = Judging()
    omit: bool = False
    column: str = TEXT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        raw = json.loads(text)
        raw["cells"] = tuple(Cell(**cell) for cell in raw["cells"])
        raw["judging"] = Judging.load(raw["judging"])
        return cls(**raw)


@dataclass(frozen=True)
class Order:
    """Documents of one variant of a task to measure under every cell of it.

    Attributes:
        done: cell key -> documents of these that are on disk.
        failed: keys of the cells to leave alone.
    """

    variant: str
    documents: tuple[str, ...]
    done: dict[str, list[str]]
    failed: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        raw = json.loads(text)
        return cls(raw["variant"], tuple(raw["documents"]), raw["done"], tuple(raw["failed"]))
