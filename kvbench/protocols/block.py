"""The protocol ``block``: disjoint blocks of a document, each read with a fresh cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvbench.data.documents import Document
from kvbench.errors import UserError
from kvbench.methods import layout_id
from kvbench.protocols.base import BOS, CHUNK, Protocol, Setting, check_length
from kvbench.protocols.pieces import MIN_TOKENS, Cut, Piece, Tokenizer, bytes_between

if TYPE_CHECKING:
    from kvbench.data.tasks import Task  # needs pydantic, which GPU machines may lack

PRESETS = {"standard": 512, "paper": 256}
"""Block length by preset; the Sentinel scripts use 256."""


@dataclass(frozen=True)
class Block(Protocol):
    """Disjoint blocks of ``length`` tokens; every token but the first of each block is scored."""

    name = "block"
    settings = {
        "preset": Setting("auto", tuple(PRESETS)), "block": Setting("auto", least=32), "chunk": CHUNK, "bos": BOS,
    }
    length_option = "block"
    may_exceed = True
    scores_context = True

    length: int

    @classmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        given = options["block"]
        length = PRESETS[options["preset"]] if given == "auto" else int(given)
        check_length(length, context, model, f"--set block={context}")
        return cls(int(options["chunk"]), options["bos"], length)

    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        for document in documents:
            yield document, cut_blocks(document, tokenizer, self.length, with_words)

    @property
    def lengths(self) -> str:
        return f"L:{self.length}"

    @property
    def seq_len(self) -> int:
        return self.length


def cut_blocks(document: Document, tokenizer: Tokenizer, length: int, with_words: bool = False) -> Cut:
    """Cut a document into disjoint blocks of ``length`` tokens, BOS included; the first token is context only.

    Raises:
        UserError: word positions are requested, and the tokenizer gives no offsets.
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
            bytes_between(document.text, ends, tokenizer, ids, scored, stop),
            layout_id(document.id, block),
            words=None if words is None else (*[(-1, 0, 0)] * len(lead), *words[start:stop]),
        ))
    return Cut(tuple(pieces), dropped)


def word_places(text: str, ends: list[int]) -> list[tuple[int, int, int]]:
    """For tokens that end at the characters ``ends``: index of the line, of the word in it, and words of the line.

    Words are separated by single spaces, as in the released Sentinel code.
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
