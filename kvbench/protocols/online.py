"""The online protocol: what comes next is scored, given the memory of t chunks (arXiv 2312.03414).

Chunks are turns of a dialogue, entries of a profile, demonstrations, or runs of text. The context
of t chunks is compressed chunk by chunk; the query and the target are read raw after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvbench.corpora.documents import Document
from kvbench.corpora.tasks import OnlineSpec
from kvbench.errors import UserError
from kvbench.methods import layout_id
from kvbench.protocols.cut import Cut, Piece, Tokenizer


def online_trials(
    documents: Sequence[Document], tokenizer: Tokenizer, spec: OnlineSpec
) -> Iterator[tuple[Document, Cut]]:
    """A trial per document and time step that the document is long enough for.

    Each trial is a document of its own, whose group is the document that it is taken from.

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
            if found is None:
                continue
            chunks, query, target, n_bytes = found
            ids = [token for chunk in chunks for token in chunk]
            name = f"{document.id}:t{step:02d}"
            piece = Piece(
                name, (*ids, *query, *target), len(ids), len(ids) + len(query), n_bytes, layout_id(name, 0),
                f"step={step}", tuple(len(chunk) for chunk in chunks),
            )
            yield Document(name, document.group, ""), Cut((piece,), 0)


_Trial = tuple[list[list[int]], list[int], list[int], int]


def _turns(document: Document, tokenizer: Tokenizer, spec: OnlineSpec, step: int) -> _Trial | None:
    """(chunks, query, target, bytes of the target): t turns, the query, and its answer."""
    turns = list(document.turns)
    if step + 2 > len(turns):
        return None
    query, answer = (turns[step], turns[step + 1]) if spec.query == "next" else (turns[-2], turns[-1])
    chunks = [tokenizer.encode((spec.between if i else "") + turn)[0] for i, turn in enumerate(turns[:step])]
    chunks[0] = [*tokenizer.lead(), *chunks[0]]
    # A line break or a label before the answer is part of the query; a space, of the answer's first word.
    label = spec.before_answer.rstrip(" ")
    asked, target = f"{spec.between}{query}{label}", spec.before_answer[len(label) :] + answer
    return chunks, tokenizer.encode(asked)[0], tokenizer.encode(target)[0], len(target.encode())


def _text(document: Document, tokenizer: Tokenizer, spec: OnlineSpec, step: int) -> _Trial | None:
    """(chunks, no query, target, bytes of the target): t runs of text, and the next one."""
    ids = [*tokenizer.lead(), *tokenizer.encode(document.text)[0]]
    size = spec.segment
    if len(ids) < (step + 1) * size:
        return None
    chunks = [ids[i * size : (i + 1) * size] for i in range(step)]
    target = ids[step * size : (step + 1) * size]
    return chunks, [], target, len(tokenizer.hf.decode(target).encode())
