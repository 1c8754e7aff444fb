"""The records of tasks that ask questions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from kvbench.store.records import SCHEMA


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        ids: the generated tokens, without the end token; ``text``: the text that they decode to.
        score: from 0 to 1.
        ended: whether the model ended it, or the line, before the maximum length.
        question, references: what was asked, and what counts as right; only in imported answers, since a run makes
            them again from its task.

    ``ids`` and ``ended`` are None in imported answers whose text is all that is known.
    """

    ids: tuple[int, ...] | None
    text: str
    score: float
    ended: bool | None
    question: str | None = None
    references: tuple[str, ...] = ()

    @classmethod
    def load(cls, raw: dict[str, Any]) -> Answer:
        """Restore an answer from the output of ``dataclasses.asdict``.

        Raises:
            TypeError, KeyError: a field is missing or unknown.
        """
        ids = None if raw["ids"] is None else tuple(raw["ids"])
        return cls(**{**raw, "ids": ids, "references": tuple(raw.get("references", ()))})


@dataclass(frozen=True)
class AnswerRecord:
    """The answers to the questions about one context under one cell.

    Attributes:
        group: unit that the bootstrap resamples (see ``DocumentRecord``).
        answers: in the order of the questions.
        contexts: number of contexts that were read: one, or one for each question if questions are known.
        raw: text tokens of the contexts; ``held``: entries held after they were read; both summed over them.
        peak: the most entries ever held.
        kv_logical, kv_physical, kv_full: bytes of the caches after the contexts were read (see ``DocumentRecord``),
            likewise.
        survival: for each layer and KV head the share of the entries of the evidence that are held; None if the method
            has no entries of single tokens, or the tokenizer does not say where tokens are.
        spans: name of a kind of text -> number of its tokens, and how many of them have entries (mean over heads).
        bin: what results are also reported by.
        seconds: time of all questions.

    ``raw``, ``held``, ``peak``, bytes and ``seconds`` are None where another program answered, and nobody counted.
    """

    document: str
    group: str
    answers: tuple[Answer, ...]
    contexts: int
    raw: int | None
    held: int | None
    peak: int | None
    kv_logical: float | None
    kv_physical: float | None
    kv_full: float | None
    survival: tuple[tuple[float, ...], ...] | None = None
    spans: dict[str, tuple[int, float]] | None = None
    bin: str | None = None
    seconds: float | None = 0.0
    schema: int = SCHEMA

    @property
    def key(self) -> str:
        return self.document

    @property
    def score(self) -> float:
        """Mean score of the answers."""
        return sum(answer.score for answer in self.answers) / len(self.answers)

    @property
    def evidence(self) -> float | None:
        """Share of the evidence's entries that are held, mean over layers and KV heads; None if not known."""
        return None if self.survival is None else fmean(share for layer in self.survival for share in layer)

    def without_texts(self) -> AnswerRecord:
        """The record with the scores of its answers and how many tokens they have."""
        return replace(self, answers=tuple(
            Answer(None if answer.ids is None else (0,) * len(answer.ids), "", answer.score, answer.ended)
            for answer in self.answers
        ))

    @classmethod
    def load(cls, raw: dict[str, Any]) -> AnswerRecord:
        """Restore a record from the output of ``dataclasses.asdict``.

        Raises:
            TypeError, KeyError: a field is missing or unknown.
        """
        return cls(**{**raw, "answers": tuple(map(Answer.load, raw["answers"]))})
