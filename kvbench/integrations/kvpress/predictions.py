"""The rows of a prediction file, scored, and grouped by the context that they ask about."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvbench.data.files import Record, read_records
from kvbench.errors import UserError
from kvbench.integrations.kvpress.datasets import Dataset, dataset_of, rule_of
from kvbench.integrations.kvpress.references import parse_references
from kvbench.store.answer_records import Answer, AnswerRecord

PREDICTIONS = "predictions.csv"
CONTEXT, QUESTION, TASK, ANSWER, COUNTED = "context", "question", "task", "predicted_answer", "compression_ratio"
_IDS = ("_id", "id", "unique_id")
"""Columns by which data sets name their samples."""


@dataclass(frozen=True)
class Prediction:
    """One row: a question about a context, and the answer.

    Attributes:
        where: file and line.
        context: the context, or what the column of contexts has in its place; empty if there is no such column.
        name: what the data set calls the sample; empty if it has no name.
        counted: the share removed as kvpress counted it; None if it is not in the file.
    """

    where: str
    subtask: str
    context: str
    name: str
    question: str
    prefix: str
    references: tuple[str, ...]
    answer: str
    score: float
    counted: float | None

    @property
    def key(self) -> str:
        """Hash of what was asked, equal in every file."""
        asked = (self.context, self.subtask, self.name, self.question, self.prefix, *self.references)
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:10]

    def asked_at_once(self) -> Prediction:
        """The row as kvpress writes it if the question was compressed together with the context (``query_aware``)."""
        joined = self.context and self.context + self.question
        return Prediction(
            self.where, self.subtask, joined, self.name, "", self.prefix, self.references, self.answer, self.score,
            self.counted,
        )


def file_of(path: Path) -> Path:
    """The prediction file itself, or that of a folder of results.

    Raises:
        UserError: there is none.
    """
    file = path / PREDICTIONS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"There is no prediction file {file}.", f"Give files that kvpress wrote: {PREDICTIONS}.")
    if ".csv" not in (suffix.lower() for suffix in file.suffixes):
        raise UserError(f"{file} is no .csv.", f"Give files that kvpress wrote: {PREDICTIONS}.")
    return file


def read_predictions(path: Path, dataset: str, column: str = "") -> list[Prediction]:
    """Read and score the rows of a file, in order.

    Args:
        dataset: name of the data set.
        column: column that says which rows share a context; if empty, ``context`` where there is one.

    Raises:
        UserError: the file is damaged or lacks a column, a row cannot be read or has no rule, or a row stands twice.
    """
    rules = dataset_of(dataset)
    needed = [name for name in (QUESTION, rules.references, ANSWER, TASK if rules.has_subtasks else "", column) if name]
    found: list[Prediction] = []
    seen: dict[str, str] = {}
    for record in read_records(path, needed):
        lacking = [name for name in needed if name not in record.values]
        if lacking:
            raise UserError(
                f"{path}, line 1: there is no column {', '.join(map(repr, lacking))}.",
                f"Columns: {', '.join(sorted(record.values))}.",
            )
        row = _row(record, rules, dataset, column or CONTEXT)
        is_apart = row.name or (row.question and (row.context or rules.told_apart))
        if is_apart and (first := seen.setdefault(row.key, row.where)) != row.where:
            raise UserError(
                f"{row.where}: the same question about the same context stands in {first.removeprefix(f'{path}, ')} "
                "already.", "Remove one of them.",
            )
        found.append(row)
    if not found:
        raise UserError(f"{path} has no rows below its first line.", "Give a file of an evaluation that finished.")
    return found


def _row(record: Record, rules: Dataset, dataset: str, context: str) -> Prediction:
    values, where = record.values, record.where
    subtask = values.get(TASK) or ""
    rule = rule_of(dataset, subtask, where)
    text = values[rules.references]
    references = parse_references(text, where) if rules.is_list else (text,)
    counted = values.get(COUNTED)
    try:
        share = float(counted) if counted else None
    except ValueError:
        raise UserError(f"{where}: {COUNTED} {counted!r} is not a number.", "Mend the row.") from None
    answer = values[ANSWER]
    return Prediction(
        where, subtask, values.get(context) or "", next((values[name] for name in _IDS if values.get(name)), ""),
        values[QUESTION], values.get("answer_prefix") or "", references, answer,
        rule(rules.clean(answer, subtask.removesuffix("-e")), references), share,
    )


@dataclass(frozen=True)
class Asked:
    """The records of a file.

    Attributes:
        by: column that said which rows share a context; empty if none did.
        records: one for each context, by its id.
        where: id of a context -> file and line of its first row.
        counted: mean share removed as kvpress counted it; None if it is not in the file.
    """

    by: str
    records: dict[str, AnswerRecord]
    where: dict[str, str]
    counted: float | None


def grouped(rows: Sequence[Prediction], known: bool, column: str = "") -> Asked:
    """Group rows by context. Rows whose context is not known are a context each, told apart by what they ask.

    Args:
        known: whether the question was compressed as well, so that every question has read a context of its own.
        column: the column that the rows' contexts were read from; ``context`` if empty.
    """
    several = len({row.subtask for row in rows}) > 1
    contexts: dict[str, list[Prediction]] = {}
    seen: Counter[str] = Counter()
    for row in rows:
        key = hashlib.sha256(row.context.encode()).hexdigest()[:10] if row.context else row.key
        name = f"{row.subtask or 'context'}-{key}"
        if not row.context:
            seen[name] += 1
            name += f"-{seen[name]}" if seen[name] > 1 else ""
        contexts.setdefault(name, []).append(row)
    counted = [row.counted for row in rows if row.counted is not None]
    records = {
        name: _record(name, mine, known, f"task={mine[0].subtask}" if several else None)
        for name, mine in contexts.items()
    }
    return Asked(
        (column or CONTEXT) if any(row.context for row in rows) else "",
        records, {name: mine[0].where for name, mine in contexts.items()},
        sum(counted) / len(rows) if len(counted) == len(rows) else None,
    )


def _record(name: str, rows: Sequence[Prediction], known: bool, bin_name: str | None) -> AnswerRecord:
    """The record of a context; entries, bytes and times are not known."""
    answers = tuple(
        Answer(None, row.answer, row.score, None, row.question or None, row.references)
        for row in sorted(rows, key=lambda row: row.key)
    )
    return AnswerRecord(
        name, name, answers, len(answers) if known else 1, None, None, None, None, None, None,
        bin=bin_name, seconds=None,
    )
