"""The online protocol: text is scored, given the compressed memory of the t chunks before it (arXiv 2312.03414).

Chunks are turns of a dialogue, entries of a profile, demonstrations, or runs of text. The context of t chunks is
compressed chunk by chunk; the query and the target after it are read without compression.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from kvbench.data.documents import Document
from kvbench.data.tasks import OnlineSpec, Task
from kvbench.errors import UserError
from kvbench.methods import layout_id
from kvbench.protocols.base import BOS, CHUNK, Protocol
from kvbench.protocols.pieces import Cut, Part, Piece, Tokenizer, bytes_between


@dataclass(frozen=True)
class Online(Protocol):
    """Trials after as many chunks as the task says, each of which scores the text that comes next."""

    name = "online"
    kind = "online"
    settings = {"chunk": CHUNK, "bos": BOS}
    in_chunks = True

    spec: OnlineSpec

    @classmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        assert task.online is not None, "the task is of this kind"
        return cls(int(options["chunk"]), options["bos"], task.online)

    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        yield from online_trials(documents, tokenizer, self.spec)

    @property
    def lengths(self) -> str:
        return self.spec.signature()

    def limited(self, documents: Sequence[Document], limit: int | None) -> tuple[Sequence[Document], int | None]:
        """Limit the number of documents; each gives many trials."""
        return documents[:limit], None


def online_trials(
    documents: Sequence[Document], tokenizer: Tokenizer, spec: OnlineSpec
) -> Iterator[tuple[Document, Cut]]:
    """Yield a trial per document and time step that the document is long enough for.

    Each trial counts as a document, whose group is that of the document it is taken from. It has no piece, and counts
    as skipped, if a chunk or the target has no token of its own.

    Raises:
        UserError: the documents have no turns, and the task asks for turns.
    """
    for document in documents:
        if spec.query != "text" and len(document.turns) < 2:
            raise UserError(
                f"Document {document.id} has no turns.",
                'Every row must look like {"turns": ["...", "..."], "answer": "..."}.',
            )
        for step in spec.steps:
            found = _text(document, tokenizer, spec, step) if spec.query == "text" else _turns(
                document, tokenizer, spec, step
            )
            if found is not None:
                name = f"{document.id}:t{step:02d}"
                yield Document(name, document.group, ""), _cut(name, tokenizer, found, step)


@dataclass(frozen=True)
class _Trial:
    """The token ids of a trial, tokenised as one text; ``version`` as in a piece."""

    chunks: tuple[tuple[int, ...], ...]
    query: tuple[int, ...]
    target: Part
    version: int = 1


def _cut(name: str, tokenizer: Tokenizer, trial: _Trial, step: int) -> Cut:
    """The piece of a trial; none if a token spans the whole of a chunk, or if there is nothing to score."""
    if not all(trial.chunks) or not trial.target.ids:
        return Cut((), 0)
    chunks = ((*tokenizer.lead(), *trial.chunks[0]), *trial.chunks[1:])
    ids = tuple(token for chunk in chunks for token in chunk)
    piece = Piece(
        name, (*ids, *trial.query, *trial.target.ids), len(ids), len(ids) + len(trial.query), trial.target.n_bytes,
        layout_id(name, 0), f"step={step}", tuple(map(len, chunks)), version=trial.version,
    )
    return Cut((piece,), 0)


def _turns(document: Document, tokenizer: Tokenizer, spec: OnlineSpec, step: int) -> _Trial | None:
    """t turns as chunks, the query, and its answer, tokenised as one text; None if there are too few turns."""
    turns = list(document.turns)
    if step + 2 > len(turns):
        return None
    query, answer = (turns[step], turns[step + 1]) if spec.query == "next" else (turns[-2], turns[-1])
    # A line break or label before the answer belongs to the query, a space to the answer's first word.
    label = spec.before_answer.rstrip(" ")
    texts = [(spec.between if i else "") + turn for i, turn in enumerate(turns[:step])]
    texts += [f"{spec.between}{query}{label}", spec.before_answer[len(label) :] + answer]
    *chunks, asked, target = tokenizer.split(texts)
    parts = (*(chunk.ids for chunk in chunks), asked.ids, target.ids)
    return _Trial(parts[:-2], asked.ids, target, 1 if parts == tokenizer.apart(texts) else 2)


def _text(document: Document, tokenizer: Tokenizer, spec: OnlineSpec, step: int) -> _Trial | None:
    """t runs of text as chunks, no query, and the next run as the target; None if the text is too short."""
    ids, ends = tokenizer.encode(document.text)
    lead, size = len(tokenizer.lead()), spec.segment
    bounds = [max(0, i * size - lead) for i in range(step + 2)]  # the first run includes a BOS, if any
    if len(ids) < bounds[-1]:
        return None
    chunks = tuple(tuple(ids[start:stop]) for start, stop in pairwise(bounds[:-1]))
    start, stop = bounds[-2:]
    target = Part(tuple(ids[start:stop]), bytes_between(document.text, ends, tokenizer, ids, start, stop))
    decoded = len(tokenizer.hf.decode(target.ids).encode())  # some decoders drop a leading space
    return _Trial(chunks, (), target, 1 if target.n_bytes == decoded else 2)
