"""Runs written by hand, without a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.store.answer_records import Answer, AnswerRecord
from kvbench.store.folder import RUN, RunFolder
from kvbench.store.records import Cell, DocumentRecord

CELL = Cell("m", None, "h", "auto", "cpu", "sinks", "0.5", "method", "minidocs", 1, "d", "block", "streamed",
            {}, None, None, 0)
SINKS, LOCAL = CELL, replace(CELL, method="local")
TEXT = "The mill by the old bridge had nine flat stones, and an otter named Brindle kept them well. "
DOCUMENTS = [f"d{i}" for i in range(20)]


def record(name: str) -> DocumentRecord:
    return DocumentRecord(
        name, name, 1, 0, 10, 40, 30.0, 5, 0, 0.1, {"500": 10}, 9, 11, 6, 5.0, 10, 9, 60.0, 60.0, 110.0
    )


def made(path: Path, cells: Sequence[tuple[Cell, float]], **info: Any) -> Path:
    """A run whose cells have some nats more per document than a common base."""
    folder = RunFolder(path)
    path.mkdir()
    rng = np.random.default_rng(0)
    base = 30 + 5 * rng.normal(size=len(DOCUMENTS))
    noise = rng.normal(size=(len(cells), len(DOCUMENTS)))
    task = {
        "kind": "lm", "answers": False, "version": 1, "signature": "block|L:512", "seq_len": 512, "new_tokens": None,
        "documents": DOCUMENTS, **info,
    }
    (path / RUN).write_text(json.dumps({
        "content": "c", "tasks": {cell.setting: task for cell, _ in cells},
        "cells": [dataclasses.asdict(cell) for cell, _ in cells],
    }))
    for (cell, more), shaken in zip(cells, noise, strict=True):
        folder.open_cell(cell)
        records: list[DocumentRecord] = [
            replace(record(name), nll=float(b + more + 0.1 * s))
            for name, b, s in zip(task["documents"], base, shaken, strict=False)
        ]
        folder.append(cell, records)
    return path


ASKED = replace(CELL, task="needles", protocol="answer", options={"length": "auto"})
"""A cell of a task that asks questions; ``FULL_ASKED`` its full cache."""
FULL_ASKED = replace(ASKED, method="full", ratio_asked=None, role="control")


def sample(
    name: str, scores: Sequence[float], survival: Sequence[Sequence[float]] | None = None, bin: str | None = None
) -> AnswerRecord:
    """The answers about one context, with these scores."""
    answers = tuple(Answer((1, 2), "text", score, True) for score in scores)
    shares = None if survival is None else tuple(map(tuple, survival))
    return AnswerRecord(name, name, answers, 1, 100, 50, 100, 5.0, 5.0, 10.0, shares, None, bin)


def asked(path: Path, cells: Sequence[tuple[Cell, Sequence[AnswerRecord]]], length: int = 512) -> Path:
    """A run of tasks that ask questions; all cells have records of the same samples."""
    folder = RunFolder(path)
    path.mkdir()
    (path / RUN).write_text(json.dumps({
        "content": "c", "cells": [dataclasses.asdict(cell) for cell, _ in cells],
        "tasks": {cell.setting: {
            "kind": "answer", "version": 1, "signature": f"answer|L:{length}|needle-grid", "seq_len": None,
            "documents": [record.document for record in records],
        } for cell, records in cells},
    }))
    for cell, records in cells:
        folder.open_cell(cell)
        folder.append(cell, records)
    return path
