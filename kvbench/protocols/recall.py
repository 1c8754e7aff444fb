"""The recall protocol: a fact is stated among prose, and asked for after a distance in tokens.

Prose, fact, prose, question and answer are one text, as people would write it down, and tokenised as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from kvbench.data.documents import Document
from kvbench.data.facts import FACT_HIGH, FACT_LOW, NAMES, THINGS, fact
from kvbench.data.tasks import RecallSpec, Task
from kvbench.errors import UserError
from kvbench.methods import layout_id
from kvbench.protocols.base import BOS, CHUNK, Protocol, Setting
from kvbench.protocols.pieces import Cut, Part, Piece, Tokenizer

ROUND = 20
"""Contexts are multiples of it, so that round ratios are met exactly."""

HIDDEN, KNOWN = "hidden", "known"
"""Whether the question of a trial is read after the context was compressed, or is the end of it."""

REACH, STARTS = 48, 64
"""How far a border is moved, in characters, and how many places of the prose are tried."""


@dataclass(frozen=True)
class Recall(Protocol):
    """Facts among prose, each asked for after one of the task's distances, where its answer is scored.

    Attributes:
        spec: the lengths, which are the task's own.
        known: the question is part of the context.
    """

    name = "prefix"
    kind = "recall"
    settings = {"chunk": CHUNK, "bos": BOS, "question": Setting("both", ("both", HIDDEN, KNOWN))}

    spec: RecallSpec
    known: bool

    @classmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        assert task.recall is not None, "the task is of this kind"
        return cls(int(options["chunk"]), options["bos"], task.recall, options.get("question", HIDDEN) == KNOWN)

    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        yield from recall_trials(documents, tokenizer, self.spec, seed, self.known)

    @property
    def lengths(self) -> str:
        return f"{self.spec.signature()}|question:{KNOWN if self.known else HIDDEN}"


@dataclass(frozen=True)
class _Prose:
    """A document that facts are hidden in.

    Attributes:
        length: in tokens.
        ends: of its tokens in its text, where the tokenizer says them.
    """

    document: Document
    length: int
    ends: list[int] | None

    def place(self, token: int) -> int:
        """About where a token begins, in characters."""
        token = min(max(token, 0), self.length)
        if self.ends is None:
            return len(self.document.text) * token // max(1, self.length)
        return self.ends[token - 1] if token else 0


@dataclass(frozen=True)
class _Wanted:
    """What a trial has to be, in tokens.

    Attributes:
        parts: the fact, the question and the answer.
        known: the question is part of the context.
    """

    tokenizer: Tokenizer
    spec: RecallSpec
    parts: tuple[str, str, str]
    distance: int
    known: bool

    def split(self, text: str, first: int, middle: int, last: int) -> tuple[Part, ...]:
        """Prose up to the fact, the fact, prose up to the question, the question, the answer."""
        statement, question, answer = self.parts
        return self.tokenizer.split((text[first:middle], statement, text[middle:last], question, answer))

    def asked(self, question: int) -> int:
        """Tokens of the question that are in the context: if it is known, all but the last, from which the answer
        is predicted once the context has been compressed."""
        return max(0, question - 1) if self.known else 0

    def before(self, statement: int, question: int) -> int:
        """Tokens of prose before a fact of so many tokens."""
        rest = len(self.tokenizer.lead()) + statement + self.distance + self.asked(question)
        return -(-max(self.spec.context, self.spec.lead + rest) // ROUND) * ROUND - rest

    def missing(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Tokens of prose that are missing before and after the fact; negative if there are too many."""
        before, statement, after, question, _ = (len(part.ids) for part in parts)
        return self.before(statement, question) - before, self.distance - after


def recall_trials(
    documents: Sequence[Document], tokenizer: Tokenizer, spec: RecallSpec, seed: int, known: bool = False
) -> Iterator[tuple[Document, Cut]]:
    """Facts among prose, each asked for after one of the distances, in turn.

    The context is prose, the fact, and as much prose as the distance says; if the question is ``known``, then
    the question as well, without its last token. Prose before the fact makes it at least ``spec.context`` tokens
    long, and a multiple of 20. Each trial is a document of its own; its group is the document that the prose is
    taken from.

    How long a text is in tokens is only known once it has been tokenised. So prose is first cut where it has as many
    tokens as are wanted when it stands by itself, and the whole text is tokenised; its end, then its beginning is
    moved by what is missing, and further, character by character, to and fro, until both lengths are exact. If that
    does not come about within 48 characters, the fact moves on by a token of the prose, at last to the next document.
    None of this is random.

    Raises:
        UserError: no document has the prose for it, or no place in it makes the lengths exact.
    """
    proses = [_Prose(d, len(ids), ends) for d in documents for ids, ends in (tokenizer.encode(d.text),)]
    for trial in range(spec.trials * len(spec.distances)):
        distance = spec.distances[trial % len(spec.distances)]
        rng = np.random.default_rng([seed, trial])
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        number = int(rng.integers(FACT_LOW, FACT_HIGH, endpoint=True))
        statement, answer = fact(thing, name, number), f" {number}"
        question = statement.split(answer)[0]
        wanted = _Wanted(tokenizer, spec, (statement, question, answer), distance, known)
        lead = wanted.before(*(len(ids) for ids in tokenizer.apart((statement, question))))
        usable = [prose for prose in proses if prose.length >= lead + distance]
        if not usable:
            raise UserError(
                f"No document has the {lead + distance} tokens of prose that recall at distance "
                f"{distance} needs."
            )
        first = trial % len(usable)
        start = int(rng.integers(0, usable[first].length - lead - distance, endpoint=True))
        found = next(_placements(wanted, [*usable[first:], *usable[:first]], start, lead), None)
        if found is None:
            raise UserError(
                f"recall: no document has a place with exactly {distance} tokens between a fact and its question, as "
                "this tokenizer counts.", "Give longer documents with --data.",
            )
        yield _trial(f"recall-{distance:04d}-{trial:04d}", wanted, *found)


def _placements(
    wanted: _Wanted, proses: Sequence[_Prose], start: int, lead: int
) -> Iterator[tuple[_Prose, tuple[Part, ...]]]:
    """Where the lengths can be had: in the first document from ``start`` on, then in the others."""
    for prose in proses:
        places = prose.length - lead - wanted.distance + 1
        for move in range(min(STARTS, places)):
            parts = _placed(wanted, prose, (start + move) % places, lead)
            if parts is not None:
                yield prose, parts


def _placed(wanted: _Wanted, prose: _Prose, start: int, lead: int) -> tuple[Part, ...] | None:
    """The parts of a trial whose prose begins about at a token; None if the lengths cannot be had there."""
    text, end = prose.document.text, start + lead + wanted.distance
    first, middle = prose.place(start), prose.place(start + lead)
    _, missing = wanted.missing(wanted.split(text, first, middle, prose.place(end)))
    for last in _nearest(prose.place(end + missing), middle, len(text)):
        missing, after = wanted.missing(wanted.split(text, first, middle, last))
        if after == 0:
            break
    else:
        return None
    for first in _nearest(prose.place(start - missing), 0, middle):
        parts = wanted.split(text, first, middle, last)
        if wanted.missing(parts) == (0, 0) and parts[-1].ids:
            return parts
    return None


def _nearest(place: int, low: int, high: int) -> Iterator[int]:
    """Places from low to high: this one, and those around it, the nearest first."""
    for step in range(REACH + 1):
        yield from (p for p in dict.fromkeys((place + step, place - step)) if low <= p <= high)


def _trial(name: str, wanted: _Wanted, prose: _Prose, parts: Sequence[Part]) -> tuple[Document, Cut]:
    before, statement, after, question, answer = parts
    asked = wanted.asked(len(question.ids))
    context = (*wanted.tokenizer.lead(), *before.ids, *statement.ids, *after.ids, *question.ids[:asked])
    raw = question.ids[asked:]
    piece = Piece(
        name, (*context, *raw, *answer.ids), len(context), len(context) + len(raw), answer.n_bytes,
        layout_id(name, 0), f"distance={wanted.distance}", ahead=min(len(raw), 1) if wanted.known else 0, version=2,
    )
    return Document(name, prose.document.group, ""), Cut((piece,), 0)
