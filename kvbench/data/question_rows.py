"""Data sets of questions about long contexts: rows of a file or of the hub, made into samples as a task file says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter, ascii_uppercase
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvbench.data.files import Record
from kvbench.data.rows import checked_text
from kvbench.data.samples.qa_scoring import NUMBERS
from kvbench.data.samples.sample import Question, Sample
from kvbench.data.samples.scoring import SCORING
from kvbench.errors import UserError

IN_QUESTION = ("label", "label_published")
"""Rules by which labels that stand in the question do not count."""
_FIELD = re.compile(r"(\w+)(?:\[(\d+)\])?")
"""A column, or one element of a column that holds a list."""


class QuestionRowsSpec(BaseModel):
    """How a row becomes a context and the questions about it.

    Templates name columns in braces: ``{input}``, or ``{options[0]}`` for an element of a list. In templates of
    questions, the columns of a turn come before those of its row.

    Attributes:
        context: template of what is compressed; ``question`` of what follows; ``prefix`` of the answer's beginning.
        references: column of the right answers: a text, a number, or a list of them; a dot leads into an object, as in
            ``answers.text``.
        options: column of the options of a choice, whose letters (A, B, ...) are right answers as well.
        needs_answer: whether rows without an answer are left out; otherwise they are refused.
        labels: all labels, or the column that holds them, for scorings that look for others than the right one. For
            stories those in the question do not count.
        turns: column of a list of questions about the same context, each with columns of its own; empty for one
            question per row.
        scoring: rule of :mod:`kvbench.data.samples.scoring`; ``new_tokens``: that may be generated.
        first_line: whether only the first line of an answer is scored.
        has_template: whether chat models are asked in their template.
        stops_at_line: whether an answer ends with its first line.
        group: column by which results are also reported.
        only: rows of which this column has that value are taken; all if empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    context: str
    question: str
    prefix: str = ""
    references: str = "answers"
    options: str = ""
    needs_answer: bool = False
    labels: str | tuple[str, ...] = ""
    turns: str = ""
    scoring: str
    new_tokens: int = Field(ge=1)
    first_line: bool = False
    has_template: bool = True
    stops_at_line: bool = False
    group: str = ""
    only: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.scoring not in SCORING:
            raise ValueError(f"no scoring {self.scoring!r}; there are {', '.join(SCORING)}")
        for template in (self.context, self.question, self.prefix):
            for _, name, spec, conversion in Formatter().parse(template):
                if name is not None and (not _FIELD.fullmatch(name) or spec or conversion):
                    raise ValueError(f"{{{name}}} is not the name of a column, such as {{input}} or {{options[0]}}")
        return self

    @property
    def columns(self) -> set[str]:
        """The columns of a row that are used."""
        templates = (self.context,) if self.turns else (self.context, self.question, self.prefix)
        named = {_FIELD.match(name) for t in templates for _, name, _, _ in Formatter().parse(t) if name is not None}
        columns = {found[1] for found in named if found is not None}
        labels = self.labels if isinstance(self.labels, str) else ""
        own = (self.turns,) if self.turns else (self.references.split(".")[0], labels, self.options)
        return (columns | {*own, self.group, *self.only}) - {""}

    def sample(self, record: Record) -> Sample | None:
        """The sample of a row; None if the row is not to be taken.

        Raises:
            UserError: a column is missing, or holds something else than it must.
        """
        row = record.values
        if any(str(_value(row, name, record.where)) != value for name, value in self.only.items()):
            return None
        context = _filled(self.context, row, record.where)
        asked: list[Mapping[str, Any]] = [row]
        if self.turns:
            turns = _value(row, self.turns, record.where)
            if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
                raise _wrong(record.where, self.turns, "a list of questions, each an object with columns")
            asked = [{**row, **turn} for turn in turns]
        elif self.needs_answer and not _texts(_value(row, self.references, record.where)):
            return None
        places = [record.where] if len(asked) == 1 else [f"{record.where}, turn {i + 1}" for i in range(len(asked))]
        questions = tuple(self._question(one, place) for one, place in zip(asked, places, strict=True))
        return Sample(context, questions, bin=self._bin(row, record.where))

    def _question(self, row: Mapping[str, Any], where: str) -> Question:
        text, references = _filled(self.question, row, where), self._references(row, where)
        if self.labels:
            labels = _texts(_value(row, self.labels, where)) if isinstance(self.labels, str) else self.labels
            if not labels:
                raise _wrong(where, str(self.labels), "a list of all labels")
            others = [label for label in labels if label != references[0]]
            if self.scoring in IN_QUESTION:
                others = [label for label in others if label.lower() not in text.lower()]
            references = (references[0], *others)
        return Question(
            text, _filled(self.prefix, row, where), references, self.scoring, self.new_tokens, self.first_line,
        )

    def _references(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
        """The right answers of a question, checked."""
        found = _texts(_value(row, self.references, where))
        if not found:
            raise _wrong(where, self.references, "a text, a number, or a list of at least one, none of them empty")
        if found[0].startswith("[") and found[0].endswith("]"):
            raise _wrong(where, self.references, "an answer, but the text of a list: use .jsonl, .json or .parquet")
        number = NUMBERS.get(self.scoring)
        try:
            if number is not None:
                number(found[0])
        except ValueError:
            raise _wrong(where, self.references, "a number, which the scoring needs") from None
        if self.options:
            options = _texts(_value(row, self.options, where))
            chosen = [options.index(one) for one in found if one in options]
            if len(options) > len(ascii_uppercase) or not (chosen or set(found) & set(ascii_uppercase[: len(options)])):
                raise _wrong(where, self.references, f'one of the "{self.options}", which are 26 at most')
            found = tuple(dict.fromkeys((*found, *(ascii_uppercase[place] for place in chosen))))
        return found

    def _bin(self, row: Mapping[str, Any], where: str) -> str:
        return f"{self.group}={_value(row, self.group, where)}" if self.group else ""


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    first, dot, rest = column.partition(".")
    if dot and isinstance(row.get(first), dict):
        return _value(row[first], rest, f'{where}, "{first}"')
    if column not in row:
        there = ", ".join(map(str, row)) or "nothing"
        raise UserError(
            f'{where}: the row has no "{column}" (it has: {there}).', "Give rows with the columns that the task names.",
        )
    return row[column]


def _wrong(where: str, column: str, wanted: str) -> UserError:
    return UserError(f'{where}: the "{column}" is not {wanted}.', "Give rows like those of the data set.")


def _texts(value: Any) -> tuple[str, ...]:
    """The texts of a value that is a text, a number, or a list of them; none if one is empty, or something else."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and str(one).strip() for one in values):
        return ()
    return tuple(str(one) for one in values)


def _filled(template: str, row: Mapping[str, Any], where: str) -> str:
    """A template with the values of a row in it."""
    parts: list[str] = []
    for text, name, _, _ in Formatter().parse(template):
        parts.append(text)
        found = None if name is None else _FIELD.fullmatch(name)
        if found is None:
            continue
        value = _value(row, found[1], where)
        if found[2] is not None:
            if not isinstance(value, list) or int(found[2]) >= len(value):
                raise _wrong(where, found[1], f"a list of at least {int(found[2]) + 1}")
            value = value[int(found[2])]
        if not isinstance(value, str | int | float):
            raise _wrong(where, found[1], "a text")
        parts.append(checked_text(str(value), f'{where}: the "{found[1]}"'))
    return "".join(parts)
