"""The protocol ``stream``: one long passage per document, read with a fresh cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvbench.data.documents import Document
from kvbench.protocols.base import BOS, CHUNK, Setting
from kvbench.protocols.block import Block, cut_blocks
from kvbench.protocols.pieces import Cut, Tokenizer

if TYPE_CHECKING:
    from kvbench.data.tasks import Task  # needs pydantic, which GPU machines may lack


@dataclass(frozen=True)
class Stream(Block):
    """The first ``length`` tokens of a document; every token but the first is scored.

    Attributes:
        beyond_context: whether that is more than the model's context.
    """

    name = "stream"
    settings = {"tokens": Setting("auto", least=32), "chunk": CHUNK, "bos": BOS}
    length_option = "tokens"

    beyond_context: bool = False

    @classmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        length = context if options["tokens"] == "auto" else int(options["tokens"])
        return cls(int(options["chunk"]), options["bos"], length, length > context)

    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        for document in documents:
            yield document, cut_stream(document, tokenizer, self.length, with_words)

    @property
    def signature_suffix(self) -> str:
        return "|beyond-context" if self.beyond_context else ""


def cut_stream(document: Document, tokenizer: Tokenizer, tokens: int, with_words: bool = False) -> Cut:
    """One passage from the start of the document, of at most ``tokens`` tokens."""
    whole = cut_blocks(document, tokenizer, tokens, with_words)
    rest = sum(len(piece.ids) - len(tokenizer.lead()) for piece in whole.pieces[1:])
    return Cut(whole.pieces[:1], whole.dropped + rest)
