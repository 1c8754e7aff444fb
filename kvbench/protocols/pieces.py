"""The pieces of documents that are scored, and the tokenizer that documents are cut with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from kvbench.errors import UserError
from kvbench.methods import TextStructure

MIN_TOKENS = 32
"""Least length in tokens; shorter tails and documents are not scored but counted."""

CONTEXT = 8
"""Number of preceding tokens that are decoded along with others, if a tokenizer gives no offsets."""


@dataclass(frozen=True)
class Asked:
    """What a piece asks for, and where its answer is.

    Attributes:
        references, scoring: what the answer is compared with, and how.
        new_tokens: that may be generated.
        asked_at: index of the first token of the question.
        first_line: whether only the first line of the answer is scored.
        follow: token ids of the question as it follows the answer to the one before; None if it never does.
        spans: name, first token and end of every part of the context that is more than filler; None if the tokenizer
            does not say where tokens are.
    """

    references: tuple[str, ...]
    scoring: str
    new_tokens: int
    spans: tuple[tuple[str, int, int], ...] | None
    asked_at: int
    first_line: bool = False
    follow: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """One scored sequence, read with a fresh cache.

    Attributes:
        document: id of the document it belongs to.
        ids: token ids; the method compresses the first ``context`` of them.
        context: number of tokens that the method compresses; the rest is read without further compression.
        scored: index of the first target; tokens before it are context only.
        n_bytes: UTF-8 bytes of the scored text.
        layout: which of the 16 random layouts it is read under.
        bin: key by which results are also reported separately, such as ``distance=120``.
        chunks: lengths of the chunks that the context came in; empty for running text.
        words: for every token the index of its line, of its word, and the words of the line; None unless a method needs
            it.
        is_generated: whether the model generates the text after the context; ``ids`` has the author's own.
        after: token ids of the author's text after that.
        ahead: number of tokens after the context whose queries a policy sees before it chooses what to keep.
        version: version of the tokenisation: 2 where tokenising the parts of the text separately gives other tokens.
        asked: what is asked about the context; None if its text is scored.
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
    is_generated: bool = False
    after: tuple[int, ...] = ()
    ahead: int = 0
    version: int = 1
    asked: Asked | None = None

    @property
    def planned(self) -> int:
        """Number of text tokens that the method's layout covers."""
        return len(self.ids) if self.is_generated else self.context

    @property
    def shape(self) -> tuple[int, int, int, tuple[int, ...]]:
        """Pieces of equal shape can share a batch; under a seeded method, only if their layouts agree."""
        return len(self.ids), self.context, self.scored, self.chunks

    @property
    def structure(self) -> TextStructure:
        """What a layout may know of the text."""
        return TextStructure(self.chunks, self.words, self.context if self.is_generated else 0)


@dataclass(frozen=True)
class Cut:
    """The pieces of one document, and the number of its tokens that are in none of them."""

    pieces: tuple[Piece, ...]
    dropped: int


class Part(NamedTuple):
    """The token ids of one part of a text, and the number of UTF-8 bytes that they cover."""

    ids: tuple[int, ...]
    n_bytes: int


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
        """Token ids without special tokens, and where each token ends in the text, in characters; None if unknown."""
        if not self.hf.is_fast:
            return list(self.hf(text, add_special_tokens=False).input_ids), None
        out = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        if self._leaves_spaces_out:
            tokens = self.hf.convert_ids_to_tokens(out.input_ids)
            return list(out.input_ids), _ends_with_spaces(text, out.offset_mapping, tokens)
        return list(out.input_ids), list(accumulate((end for _, end in out.offset_mapping), max))

    @cached_property
    def _leaves_spaces_out(self) -> bool:
        """Whether tokens are byte-level and include spaces, while offsets exclude the spaces at the ends of tokens."""
        made_by = self.hf.backend_tokenizer
        ways, after = (
            b"".join(part.__getstate__() for part in parts if part is not None)
            for parts in ((made_by.pre_tokenizer, made_by.decoder), (made_by.post_processor,))
        )
        return b'"ByteLevel"' in ways and b'"trim_offsets":true' in after

    def split(self, parts: Sequence[str]) -> tuple[Part, ...]:
        """Tokenise the parts of one text together; a token that crosses a boundary belongs to the later part.

        Every token of the joined text is in exactly one part; a part whose tokens all reach into the next is empty.
        Without offsets, the text up to the boundary is tokenised as well: the tokens that both begin with lie before
        it.
        """
        text = "".join(parts)
        ids, ends = self.encode(text)
        cuts = [0]
        for border in list(accumulate(map(len, parts)))[:-1]:
            if border == 0:
                before = 0
            elif ends is None:
                before = _alike(ids, self.encode(text[:border])[0])
            else:
                before = next((i for i, end in enumerate(ends) if end > border), len(ids))
            cuts.append(max(cuts[-1], before))
        cuts.append(len(ids))
        return tuple(
            Part(tuple(ids[start:stop]), bytes_between(text, ends, self, ids, start, stop))
            for start, stop in pairwise(cuts)
        )

    def apart(self, parts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token ids of the parts, each tokenised separately."""
        return tuple(tuple(self.encode(part)[0]) for part in parts)

    def lead(self) -> tuple[int, ...]:
        return () if self.bos is None else (self.bos,)


def _ends_with_spaces(text: str, offsets: Sequence[tuple[int, int]], tokens: Sequence[str]) -> list[int]:
    """Ends of byte-level tokens whose offsets exclude spaces; a space that the tokenizer prepends to the text is not
    counted."""
    ends = [0]
    for (start, end), token in zip(offsets, tokens, strict=True):
        spaces = len(token) - len(token.rstrip("\u0120"))  # the character that stands for a space
        is_bare = bool(spaces) and start == end  # spaces only: it begins where the token before it ends
        last = ends[-1] if is_bare else end
        may_be_cut = is_bare or (spaces < len(token) and text[last - 1] != " ")
        are_cut = may_be_cut and text[last : last + spaces] == " " * spaces
        ends.append(max(ends[-1], last + spaces if are_cut else last))
    return ends[1:]


def _alike(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    pairs = zip(ids, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others)))


def make_tokenizer(hf: Any, bos: str) -> Tokenizer:
    """Wrap a tokenizer. ``bos``: ``auto`` (only if the tokenizer emits one for an empty text), ``true``, ``false``.

    Raises:
        UserError: a BOS is requested and the tokenizer has none.
    """
    emitted = list(hf("").input_ids)
    token = hf.bos_token_id
    if bos == "true" and token is None:
        raise UserError("--set bos=true: the tokenizer of this model has no BOS token.")
    wanted = bos == "true" or (bos == "auto" and bool(emitted) and emitted[0] == token)
    return Tokenizer(hf, token if wanted else None)


def bytes_between(
    text: str, ends: list[int] | None, tokenizer: Tokenizer, ids: list[int], start: int, stop: int
) -> int:
    """UTF-8 bytes of tokens start .. stop - 1 of a text.

    Without ``ends`` they are decoded together with a few tokens before them, since some decoders drop a leading space.
    """
    if start == stop:
        return 0
    if ends is None:
        before = ids[max(0, start - CONTEXT) : start]
        with_before, alone = (tokenizer.hf.decode(some) for some in ([*before, *ids[start:stop]], before))
        return len(with_before.encode()) - len(alone.encode())
    first = ends[start - 1] if start else 0
    return len(text[first : ends[stop - 1]].encode())
