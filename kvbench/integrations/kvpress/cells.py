"""A prediction file as a cell of a run, with the records of its answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvbench.integrations.kvpress.datasets import dataset_of
from kvbench.integrations.kvpress.predictions import Asked, Prediction, grouped, read_predictions
from kvbench.integrations.kvpress.settings import Settings
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.manifest import TaskInfo
from kvbench.store.records import IMPORTED, Cell

VERSION = 1
"""Version of what is made of a file; part of signatures."""
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Imported:
    """A prediction file as a cell.

    Attributes:
        is_lent: whether the full cache of a hidden question stands for that of a known one.
    """

    source: Path
    cell: Cell
    info: TaskInfo
    asked: Asked
    is_lent: bool = False

    @property
    def is_full(self) -> bool:
        return self.cell.name == "full"


def imported(source: Path, settings: Settings, column: str) -> list[Imported]:
    """A file as a cell; a file of the full cache has a second one, with the question known.

    Where nothing is removed, it makes no difference whether the question is compressed as well, and kvpress'
    evaluation measures it once.

    Args:
        column: column that says which rows share a context; empty for ``context``, if there is one.

    Raises:
        UserError: the file cannot be read or scored.
    """
    rows = read_predictions(source, settings.dataset or "", column)
    made = [_made(source, settings, rows, column)]
    if settings.is_full and not settings.query_aware:
        known = dataclasses.replace(settings, query_aware=True)
        made.append(_made(source, known, [row.asked_at_once() for row in rows], column, is_lent=True))
    return made


def questions(record: AnswerRecord) -> list[tuple[str | None, tuple[str, ...]]]:
    """What was asked about a context, and what counts as right."""
    return [(answer.question, answer.references) for answer in record.answers]


def _made(
    source: Path, settings: Settings, rows: Sequence[Prediction], column: str, is_lent: bool = False
) -> Imported:
    asked = grouped(rows, settings.query_aware, column)
    documents = tuple(sorted(asked.records))
    scored = dataset_of(settings.dataset or "").scored
    info = TaskInfo(
        kind="answer", seq_len=None, documents=documents,
        signature=f"kvpress:{settings.dataset}|score:{scored}|contexts:{asked.by or 'rows'}|v:{VERSION}",
    )
    options = {
        "predictions": hashlib.sha256(source.read_bytes()).hexdigest()[:12],
        "question": "known" if settings.query_aware else None, "lent": "by question hidden" if is_lent else None,
        "press": settings.press_init_command,
        "max_new_tokens": None if settings.max_new_tokens is None else str(settings.max_new_tokens),
    }
    data = json.dumps([(name, questions(asked.records[name])) for name in documents])
    cell = Cell(
        model=f"{settings.model}{' fp8' if settings.fp8 else ''}", revision=None, model_hash="", dtype=_UNKNOWN,
        device=_UNKNOWN, method=settings.method, ratio_asked=settings.ratio_text,
        role="control" if settings.is_full else "method", task=settings.task, task_version=1,
        data_hash=hashlib.sha256(data.encode()).hexdigest(), protocol="answer", execution=IMPORTED,
        options={name: value for name, value in options.items() if value is not None}, adapter=None,
        adapter_hash=None, seed=0, variant=settings.variant, note=_note(settings, asked.counted),
    )
    return Imported(source, cell, info, asked, is_lent)


def _note(settings: Settings, counted: float | None) -> str:
    """What kvpress counted, where it is not the share that was asked for."""
    if settings.is_full or counted is None or (settings.ratio is not None and abs(counted - settings.ratio) < 0.005):
        return ""
    return f"kvpress counts {counted:.2f} removed"
