"""The recall protocol: a fact is hidden in prose, and asked for after a distance in tokens.

Prose, fact, prose, question and answer form one text and are tokenised together.
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
"""Context lengths are multiples of it, so that round ratios are met exactly."""

HIDDEN, KNOWN = "hidden", "known"
"""Whether the question of a trial follows the compressed context (hidden), or ends the context (known)."""

REACH, STARTS = 48, 64
"""Largest shift of a boundary, in characters, and the number of start positions that are tried in a document."""


@dataclass(frozen=True)
class Recall(Protocol):
    """Facts hidden in prose, each asked for after one of the task's distances; the answer is scored.

    Attributes:
        spec: the lengths, set by the task.
        known: whether the question is part of the context.
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
        length: length in tokens.
        ends: where its tokens end in its text, in characters; None if the tokenizer gives no offsets.
    """

    document: Document
    length: int
    ends: list[int] | None

    def place(self, token: int) -> int:
        """The approximate place where a token begins, in characters."""
        token = min(max(token, 0), self.length)
        if self.ends is None:
            return len(self.document.text) * token // max(1, self.length)
        return self.ends[token - 1] if token else 0


@dataclass(frozen=True)
class _Wanted:
    """The requirements on a trial, with lengths in tokens.

    Attributes:
        parts: the fact, the question and the answer.
        known: whether the question is part of the context.
    """

    tokenizer: Tokenizer
    spec: RecallSpec
    parts: tuple[str, str, str]
    distance: int
    known: bool

    def split(self, text: str, first: int, middle: int, last: int) -> tuple[Part, ...]:
        """Tokenise a trial: prose before the fact, the fact, prose before the question, the question, the answer."""
        statement, question, answer = self.parts
        return self.tokenizer.split((text[first:middle], statement, text[middle:last], question, answer))

    def asked(self, question: int) -> int:
        """Number of question tokens in the context: if the question is known, all but the last, from which the answer
        is predicted after the context has been compressed."""
        return max(0, question - 1) if self.known else 0

    def before(self, statement: int, question: int) -> int:
        """Number of tokens of prose before the fact, given the tokens of fact and question."""
        rest = len(self.tokenizer.lead()) + statement + self.distance + self.asked(question)
        return -(-max(self.spec.context, self.spec.lead + rest) // ROUND) * ROUND - rest

    def missing(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Number of tokens of prose missing before and after the fact; negative if there are too many."""
        before, statement, after, question, _ = (len(part.ids) for part in parts)
        return self.before(statement, question) - before, self.distance - after


def recall_trials(
    documents: Sequence[Document], tokenizer: Tokenizer, spec: RecallSpec, seed: int, known: bool = False
) -> Iterator[tuple[Document, Cut]]:
    """Yield trials that hide a fact in prose and ask for it after one of the distances, in turn.

    The context is prose, the fact, and prose as long as the distance; if the question is ``known``, also the question
    without its last token. Prose before the fact makes the context at least ``spec.context`` tokens long, and a
    multiple of 20. Each trial counts as a document, whose group is that of the document the prose is taken from.

    The length of a text in tokens is known only after tokenisation. So prose is first cut where it has the wanted
    number of tokens by itself, and the whole text is tokenised. Then the end and the beginning of the prose are shifted
    by the number of missing tokens, and further in both directions character by character, until both lengths are
    exact. If that fails within 48 characters, the fact moves on by one token of the prose, and finally to the next
    document. The search is deterministic.

    Raises:
        UserError: no document has enough prose, or no place in it makes the lengths exact.
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
                f"{distance} needs.", "Give longer documents, or leave the task out.",
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
    """Yield places where the lengths are exact: in the first document from token ``start`` on, then in the others."""
    for prose in proses:
        places = prose.length - lead - wanted.distance + 1
        for move in range(min(STARTS, places)):
            parts = _placed(wanted, prose, (start + move) % places, lead)
            if parts is not None:
                yield prose, parts


def _placed(wanted: _Wanted, prose: _Prose, start: int, lead: int) -> tuple[Part, ...] | None:
    """The parts of a trial whose prose begins near token ``start``; None if the lengths cannot be met there."""
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
    """Numbers from low to high within reach of ``place``, the nearest first."""
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
