"""Cutting documents into pieces that are scored: blocks, streams, prefixes, recall trials."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.corpora.documents import Document
from kvbench.corpora.facts import FACT_HIGH, FACT_LOW, NAMES, THINGS, fact
from kvbench.errors import UserError
from kvbench.methods import Structure, layout_id

if TYPE_CHECKING:
    from kvbench.corpora.tasks import RecallSpec

MIN_TOKENS = 32
"""Shorter tails and documents are not scored; they are counted."""


@dataclass(frozen=True)
class Piece:
    """One scored sequence, read with a fresh cache.

    Attributes:
        document: id of the document it belongs to.
        ids: token ids; the method compresses the first ``context`` of them.
        context: tokens under the method's layout; the rest is read without further compression.
        scored: tokens ``scored ..`` are targets; those before are context only.
        n_bytes: UTF-8 bytes of the scored text.
        layout: which of the 16 layouts it is read under.
        bin: what results are also reported by, such as ``distance=120``.
        chunks: lengths of the chunks that the context came in; empty for running text.
        words: line, word and words of the line of every token; None unless a method asks for them.
        written: what follows the context is written by the model; ``ids`` has the author's own.
        after: what the author wrote after that.
    """

    document: str
    ids: tuple[int, ...]
    context: int
    scored: int
    n_bytes: int
    layout: int
    bin: str | None = None
    chunks: tuple[int, ...] = ()
    words: tuple[tuple[int, int, int], ...] | None = None
    written: bool = False
    after: tuple[int, ...] = ()

    @property
    def planned(self) -> int:
        """Text tokens that the method's layout spans."""
        return len(self.ids) if self.written else self.context

    @property
    def shape(self) -> tuple[int, int, int, tuple[int, ...]]:
        """Pieces of equal shape can share a batch; under a seeded method, if their layouts agree."""
        return len(self.ids), self.context, self.scored, self.chunks

    @property
    def structure(self) -> Structure:
        """What a layout may know of the text."""
        return Structure(self.chunks, self.words, self.context if self.written else 0)


@dataclass(frozen=True)
class Cut:
    """The pieces of one document, and how many of its tokens none of them holds."""

    pieces: tuple[Piece, ...]
    dropped: int


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer, reduced to what cutting needs.

    Attributes:
        hf: the tokenizer.
        bos: id put before every piece, or None.
    """

    hf: Any
    bos: int | None

    def encode(self, text: str) -> tuple[list[int], list[int] | None]:
        """Token ids without special tokens, and the end of each token in the text."""
        if not self.hf.is_fast:
            return list(self.hf(text, add_special_tokens=False).input_ids), None
        out = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(out.input_ids), [end for _, end in out.offset_mapping]

    def lead(self) -> tuple[int, ...]:
        return () if self.bos is None else (self.bos,)


def make_tokenizer(hf: Any, bos: str) -> Tokenizer:
    """``bos``: ``auto`` (only if the tokenizer emits one for an empty text), ``true``, ``false``.

    Raises:
        UserError: a BOS is asked for and the tokenizer has none.
    """
    emitted = list(hf("").input_ids)
    token = hf.bos_token_id
    if bos == "true" and token is None:
        raise UserError("--set bos=true: the tokenizer of this model has no BOS token.")
    wanted = bos == "true" or (bos == "auto" and bool(emitted) and emitted[0] == token)
    return Tokenizer(hf, token if wanted else None)


def _bytes_between(text: str, ends: list[int] | None, tokenizer: Tokenizer, ids: list[int],
                   start: int, stop: int) -> int:
    """UTF-8 bytes of tokens start .. stop - 1."""
    if ends is None:
        return len(tokenizer.hf.decode(ids[start:stop]).encode())
    first = ends[start - 1] if start else 0
    return len(text[first : ends[stop - 1]].encode())


def word_places(text: str, ends: list[int]) -> list[tuple[int, int, int]]:
    """For tokens that end at ``ends``: the line, the word in it, and how many words the line has.

    Words are what lies between single spaces, as the released Sentinel code splits them.
    """
    places, counts = [], [line.count(" ") + 1 for line in text.split("\n")]
    line = word = at = 0
    for end in ends:
        for character in text[at : max(at, end - 1)]:
            if character == "\n":
                line, word = line + 1, 0
            elif character == " ":
                word += 1
        places.append((line, word, counts[line]))
        at = max(at, end - 1)
    return places


def cut_blocks(document: Document, tokenizer: Tokenizer, length: int, with_words: bool = False) -> Cut:
    """Disjoint blocks of ``length`` tokens, BOS included; the first token is context only.

    Raises:
        UserError: words are asked for, and the tokenizer does not say where its tokens are.
    """
    ids, ends = tokenizer.encode(document.text)
    lead = tokenizer.lead()
    if with_words and ends is None:
        raise UserError("--set sampler=published needs a fast tokenizer, and this model's is not.")
    words = word_places(document.text, ends) if with_words and ends is not None else None
    size = length - len(lead)
    pieces, dropped = [], 0
    for block, start in enumerate(range(0, len(ids), size)):
        stop = min(start + size, len(ids))
        block_ids = (*lead, *ids[start:stop])
        if len(block_ids) < MIN_TOKENS:
            dropped += stop - start
            continue
        scored = start if lead else start + 1
        pieces.append(Piece(
            document.id, block_ids, len(block_ids), 1,
            _bytes_between(document.text, ends, tokenizer, ids, scored, stop),
            layout_id(document.id, block),
            words=None if words is None else (*[(-1, 0, 0)] * len(lead), *words[start:stop]),
        ))
    return Cut(tuple(pieces), dropped)


def cut_stream(document: Document, tokenizer: Tokenizer, tokens: int, with_words: bool = False) -> Cut:
    """One passage from the start of the document, of at most ``tokens`` tokens."""
    whole = cut_blocks(document, tokenizer, tokens, with_words)
    rest = sum(len(piece.ids) - len(tokenizer.lead()) for piece in whole.pieces[1:])
    return Cut(whole.pieces[:1], whole.dropped + rest)


def cut_prefix(document: Document, tokenizer: Tokenizer, prefix: int, continuation: int) -> Cut:
    """The first ``prefix`` tokens are compressed; the next ``continuation`` ones are scored."""
    ids, ends = tokenizer.encode(document.text)
    lead = tokenizer.lead()
    start = prefix - len(lead)
    if len(ids) < start + continuation:
        return Cut((), len(ids))
    stop = start + continuation
    n_bytes = _bytes_between(document.text, ends, tokenizer, ids, start, stop)
    piece = Piece(document.id, (*lead, *ids[:stop]), prefix, prefix, n_bytes, layout_id(document.id, 0))
    return Cut((piece,), len(ids) - stop)


def recall_trials(
    documents: tuple[Document, ...], tokenizer: Tokenizer, spec: RecallSpec, seed: int
) -> Iterator[tuple[Document, Cut]]:
    """Facts among prose, each asked for after one of the distances, in turn.

    The context is prose, the fact, and as much prose as the distance says. Prose before the fact
    makes it at least ``spec.context`` tokens long, and a multiple of 20, so that round ratios are
    met exactly. Each trial is a document of its own; its group is the document that
    the prose is taken from.
    """
    texts = [(d, tokenizer.encode(d.text)[0]) for d in documents]
    for trial in range(spec.trials * len(spec.distances)):
        distance = spec.distances[trial % len(spec.distances)]
        rng = np.random.default_rng([seed, trial])
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        number = int(rng.integers(FACT_LOW, FACT_HIGH, endpoint=True))
        statement = tokenizer.encode(fact(thing, name, number))[0]
        question = tokenizer.encode(fact(thing, name, number).split(f" {number}")[0])[0]
        answer = _answer_tokens(tokenizer, thing, name, number, question)
        around = len(tokenizer.lead()) + len(statement)
        length = max(spec.context, spec.lead + around + distance)
        lead = -(-length // 20) * 20 - around - distance
        usable = [(d, ids) for d, ids in texts if len(ids) >= lead + distance]
        if not usable:
            raise UserError(
                f"No document has the {lead + distance} tokens of prose that recall at distance "
                f"{distance} needs."
            )
        source, ids = usable[trial % len(usable)]
        start = int(rng.integers(0, len(ids) - lead - distance, endpoint=True))
        prose = ids[start : start + lead + distance]
        context = (*tokenizer.lead(), *prose[:lead], *statement, *prose[lead:])
        name_of_trial = f"recall-{distance:04d}-{trial:04d}"
        piece = Piece(
            name_of_trial, (*context, *question, *answer), len(context),
            len(context) + len(question), len(f" {number}"), layout_id(name_of_trial, 0),
            f"distance={distance}",
        )
        yield Document(name_of_trial, source.group, ""), Cut((piece,), 0)


def _answer_tokens(
    tokenizer: Tokenizer, thing: str, name: str, number: int, question: list[int]
) -> list[int]:
    """The tokens of the number as they follow the question.

    Raises:
        UserError: the tokenizer joins question and answer, so that the answer cannot be scored.
    """
    both = tokenizer.encode(fact(thing, name, number).removesuffix(".\n\n"))[0]
    if both[: len(question)] != question:
        raise UserError("recall: the tokenizer of this model merges the question and its answer.")
    return both[len(question):]
