"""The protocol ``prefix``: a prefix is compressed once, and what follows it is scored without further compression."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvbench.data.documents import Document
from kvbench.methods import layout_id
from kvbench.protocols.base import BOS, CHUNK, Protocol, Setting, check_length
from kvbench.protocols.pieces import Cut, Piece, Tokenizer, bytes_between

if TYPE_CHECKING:
    from kvbench.data.tasks import Task  # needs pydantic, which GPU machines may lack

PREFIX_CONTEXT = 1280
"""Tokens of prefix and continuation together, if the model's context is that long."""


@dataclass(frozen=True)
class Prefix(Protocol):
    """Compresses a prefix of ``length`` tokens, and scores the next ``continuation`` tokens."""

    name = "prefix"
    settings = {
        "prefix": Setting("auto", least=32), "continuation": Setting("auto"), "chunk": CHUNK, "bos": BOS,
    }
    length_option = "prefix"
    may_exceed = True

    length: int
    continuation: int

    @classmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        whole = min(context, PREFIX_CONTEXT)
        given, more = options["prefix"], options["continuation"]
        prefix = whole * 3 // 4 if given == "auto" else int(given)
        rest = whole - whole * 3 // 4 if more == "auto" else int(more)
        check_length(prefix + rest, context, model, "a smaller --set prefix= or --set continuation=")
        return cls(int(options["chunk"]), options["bos"], prefix, rest)

    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        for document in documents:
            yield document, cut_prefix(document, tokenizer, self.length, self.continuation)

    @property
    def lengths(self) -> str:
        return f"P:{self.length}|C:{self.continuation}"

    @property
    def seq_len(self) -> int:
        return self.length

    @property
    def required_length(self) -> str:
        return f"{self.length + self.continuation} tokens"


def cut_prefix(document: Document, tokenizer: Tokenizer, prefix: int, continuation: int) -> Cut:
    """Compress the first ``prefix`` tokens and score the next ``continuation`` ones; no piece if there are too few."""
    ids, ends = tokenizer.encode(document.text)
    lead = tokenizer.lead()
    start = prefix - len(lead)
    if len(ids) < start + continuation:
        return Cut((), len(ids))
    stop = start + continuation
    n_bytes = bytes_between(document.text, ends, tokenizer, ids, start, stop)
    piece = Piece(document.id, (*lead, *ids[:stop]), prefix, prefix, n_bytes, layout_id(document.id, 0))
    return Cut((piece,), len(ids) - stop)
