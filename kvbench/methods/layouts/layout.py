"""Layouts: which token may see which entry, and until when.

A static compression method is described once, as a typed token sequence with positions and a visibility rule. Two
executions follow from that single description:

* ``Layout.visible`` over sees_everything is the **mask** of the one-pass execution;
* ``Layout.last_query`` is the **eviction rule** of the streamed execution: an entry leaves the cache as soon as no
  later query may see it.

Both executions must give the same logits; the test suite checks this for every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

TEXT, OPEN, CLOSE, COMP, SUM = 0, 1, 2, 3, 4
"""Kinds of tokens: a token of the text; one that opens a span, or stands before the text, one that closes a span; a
token whose entry becomes memory; a slot whose entry is computed from other entries."""

OUTSIDE = -1
"""The segment of a token that belongs to no span or chunk."""

_ROWS_AT_ONCE = 1024


class Tokens(NamedTuple):
    """Typed tokens as int64 tensors of one shape (or broadcastable ones).

    Attributes:
        slot: index in the input sequence, special tokens included.
        kind: ``TEXT``, ``OPEN``, ``CLOSE``, ``COMP`` or ``SUM``.
        raw: index of the token in the text; for other kinds, that of the text token before their place in the text.
        segment: index of the span or chunk the token belongs to, ``OUTSIDE`` if none.
        row: index of the adapter's embedding that is fed; -1 for text.
    """

    slot: Tensor
    kind: Tensor
    raw: Tensor
    segment: Tensor
    row: Tensor

    def at(self, where: Tensor | slice) -> Tokens:
        return Tokens(*(field[where] for field in self))

    def as_queries(self) -> Tokens:
        """Shape ``[q, 1]``, to broadcast against keys of shape ``[k]``."""
        return Tokens(*(field[:, None] for field in self))


class TextStructure(NamedTuple):
    """What a layout may know of the text besides its length.

    Attributes:
        chunks: lengths of the parts that arrive one after another, such as the turns of a dialogue; empty for running
            text.
        words: for every token the index of its line, of its word in the line, and the number of words in the line; None
            unless the method needs them.
        prefix: number of tokens that are read before the model generates the rest, at whose end the ratio is met
            exactly; 0 if all of the text is read.
        is_continued: whether it is read for text that follows it, so that nothing in it need be predicted but what
            comes after its last token.
    """

    chunks: tuple[int, ...] = ()
    words: tuple[tuple[int, int, int], ...] | None = None
    prefix: int = 0
    is_continued: bool = False


RUNNING = TextStructure()
"""Running text, of which only the length is known."""

Visibility = Callable[[Tokens, Tokens], Tensor]
"""``(queries [q, 1], keys [k]) -> bool [q, k]``. The layout adds causality and self-visibility, so the rule only
decides among tokens *before* the query."""


def sees_everything(queries: Tokens, keys: Tokens) -> Tensor:
    """The visibility of the uncompressed cache: every earlier token."""
    return (keys.slot <= queries.slot) | True


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Entries that are computed from other entries of their layer, not from a token.

    Keys and values at each of the ``slots`` are a weighted sum of those at its sources. Sources come earlier in the
    sequence and may be merged themselves (a running mean needs only the previous mean and the new entry). The
    visibility lets a ``SUM`` token see its sources, which keeps them in the cache until they are merged.

    Attributes:
        slots: int64 ``[m]``, ascending.
        sources: int64 ``[m, s]``.
        weights: float32 ``[m, s]``; 0 where a slot has fewer than s sources.
        unrotated: whether keys are averaged before the rotary embedding, and rotated to the position of the slot;
            otherwise they are averaged as cached, each rotated to its own position.
        counts: float32 ``[m]``, how many entries each of them stands for: an entry that stands for n takes n times the
            attention, log n being added to its logit; None if each is one entry.
    """

    slots: Tensor
    sources: Tensor
    weights: Tensor
    unrotated: bool = False
    counts: Tensor | None = None

    def among(self, first: int, present: Tensor) -> tuple[Tensor, Tensor]:
        """What to merge once the slots from ``first`` on have been fed.

        Args:
            present: int64, the slots in the cache, ascending.

        Returns:
            Indices into ``present`` of the entries that are merged now ``[m]``, and their weights over all present
            entries ``[m, present]``; a source that is merged now itself is replaced by its own sources.
        """
        chosen = (self.slots >= first) & (self.slots <= int(present[-1]))
        places = torch.searchsorted(present, self.slots[chosen])
        weights = torch.zeros(len(places), len(present))
        weights.scatter_add_(1, torch.searchsorted(present, self.sources[chosen]), self.weights[chosen])
        inner = weights[:, places]
        weights[:, places] = 0
        identity = torch.eye(len(places))
        return places, torch.linalg.solve_triangular(identity - inner, weights, upper=False, unitriangular=True)


@dataclass(frozen=True, eq=False)
class Layout:
    """A typed token sequence for one block of ``n_raw`` text tokens.

    Attributes:
        tokens: the input sequence, ``T`` tokens, special tokens included.
        position: int64 ``[T]``, the position id of each token.
        visibility: which earlier tokens each token may see.
        n_raw: number of text tokens in the block.
        next_segment: segment of the text that follows the block.
        merge_plan: how the ``SUM`` entries are computed; None if there are none.
        predictors: int64 ``[n_raw]``, the slot whose logits predict the token after each text token; None for the text
            tokens themselves.
        next_position: position of the text token that follows the block; None for ``n_raw``.
        written: lengths of the chunks whose special tokens are fed rows that a writer makes of their text, from the
            first token on; rows are numbered over all chunks. Empty if rows are the adapter's own.
        unread: number of text tokens, from the first on, that are not fed; the model reads what a writer made of them.
    """

    tokens: Tokens
    position: Tensor
    visibility: Visibility
    n_raw: int
    next_segment: int = OUTSIDE
    merge_plan: MergePlan | None = None
    predictors: Tensor | None = None
    next_position: int | None = None
    written: tuple[int, ...] = ()
    unread: int = 0

    def __len__(self) -> int:
        return int(self.position.shape[0])

    @property
    def is_plain(self) -> bool:
        """Whether this is ordinary causal attention over the text alone."""
        return self.visibility is sees_everything and len(self) == self.n_raw

    @cached_property
    def rows_per_chunk(self) -> int:
        """Rows of memory that a writer makes of each chunk; 0 if there are none."""
        return int(self.tokens.row.max() + 1) // len(self.written) if self.written else 0

    @cached_property
    def raw_slots(self) -> Tensor:
        """int64 ``[n_raw]``: the slots of the text tokens; -1 for those that are not fed."""
        fed = torch.nonzero(self.tokens.kind == TEXT).flatten()
        return torch.cat([fed.new_full((self.unread,), -1), fed]) if self.unread else fed

    @cached_property
    def read_slots(self) -> Tensor:
        """int64 ``[n_raw]``: the slot whose logits predict the token after each text token."""
        return self.raw_slots if self.predictors is None else self.predictors

    @cached_property
    def source(self) -> Tensor:
        """int64 ``[T]``: index of each slot's input in the concatenation [text tokens; the adapter's embeddings]."""
        kind, raw = self.tokens.kind, self.tokens.raw
        return torch.where(kind == TEXT, raw, self.n_raw + self.tokens.row)

    def text_positions(self, first: int, count: int) -> Tensor:
        """int64 ``[count]``: positions of text tokens from ``first`` on, if no special tokens come between them."""
        if first < self.n_raw:
            begin = int(self.position[self.raw_slots[first]])
        else:
            begin = (self.n_raw if self.next_position is None else self.next_position) + first - self.n_raw
        return torch.arange(begin, begin + count)

    @cached_property
    def special_slots(self) -> Tensor:
        """int64: the slots of the tokens that are not text."""
        return torch.nonzero(self.tokens.kind != TEXT).flatten()

    @cached_property
    def mask(self) -> Tensor:
        """bool ``[T, T]``: the mask of the one-pass execution, True where attention is allowed."""
        every = torch.arange(len(self))
        return self.visible(every, every)

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool ``[q, k]``: which of the slots ``keys`` each of the slots ``queries`` may see."""
        q, k = self.tokens.at(queries).as_queries(), self.tokens.at(keys)
        return (self.visibility(q, k) & (k.slot < q.slot)) | (k.slot == q.slot)

    @cached_property
    def bias(self) -> Tensor | None:
        """float32 ``[T]``: what is added to the logits of each entry; None for nothing."""
        plan = self.merge_plan
        if plan is None or plan.counts is None:
            return None
        return torch.zeros(len(self)).index_copy_(0, plan.slots, plan.counts.log())

    def biased(self, mask: Tensor, keys: Tensor) -> Tensor:
        """A mask ``[queries, keys]`` over the slots ``keys`` as attention takes it: bool, or float and added to the
        logits where entries stand for several."""
        if self.bias is None:
            return mask
        return self.bias[keys].expand(mask.shape).masked_fill(~mask, float("-inf"))

    @cached_property
    def last_query(self) -> Tensor:
        """int64 ``[T]``: the last slot that may see each entry; ``T`` if text after the block could still see it. This
        is the eviction rule."""
        size = len(self)
        last, open_ = torch.arange(size), torch.arange(size)
        # Backwards: a key that a later query sees is checked no further, so that a window costs only its size.
        for start in reversed(range(0, size, _ROWS_AT_ONCE)):
            rows = torch.arange(start, min(start + _ROWS_AT_ONCE, size))
            keys = open_[open_ <= int(rows[-1])]
            number = torch.arange(1, len(rows) + 1, dtype=torch.int16)[:, None]
            seen = (self.visible(rows, keys) * number).amax(dim=0).long()
            last[keys] = torch.where(seen > 0, start + seen - 1, last[keys])
            open_ = keys[seen == 0]
        every = self.tokens.at(slice(None))
        following = Tokens(*(torch.tensor([v]) for v in (size, TEXT, self.n_raw, self.next_segment, -1)))
        return torch.where(self.visibility(following.as_queries(), every)[0], size, last)

    def held_after(self, fed: int) -> Tensor:
        """int64: the slots that are in the cache after the first ``fed`` slots have been fed."""
        return torch.nonzero(self.last_query[:fed] >= fed).flatten()

    def since_boundary(self, targets: Tensor) -> Tensor | None:
        """How many text tokens each of ``targets`` (int64, text tokens) lies behind the last compressed piece of text.

        It is -1 before the first; None if the layout has none.
        """
        kind = self.tokens.kind
        boundary = (kind != TEXT) & (kind != OPEN)
        if not bool(boundary.any()):
            return None
        texts = self.unread + torch.cumsum(kind == TEXT, 0)
        begin = torch.cummax(torch.where(boundary, texts, -1), 0).values  # text tokens before the last boundary
        last = torch.where(targets < self.n_raw, begin[self.raw_slots][targets.clamp(max=self.n_raw - 1)], begin[-1])
        return torch.where(last < 0, -1, targets - last)

    @cached_property
    def visible_before(self) -> Tensor:
        """int64 ``[n_raw]``: how many earlier entries the query sees that predicts the token after each text token, its
        own entry excluded; 0 for text that is not fed."""
        counts = [torch.zeros(self.unread, dtype=torch.long)]
        every = torch.arange(len(self))
        for rows in torch.split(self.read_slots[self.unread :], _ROWS_AT_ONCE):
            counts.append(self.visible(rows, every).sum(dim=1) - 1)
        return torch.cat(counts)


def plain_tokens(n: int, segment: Tensor | None = None) -> Tokens:
    """``n`` text tokens without special tokens; ``segment`` marks groups (default: none)."""
    slot = torch.arange(n)
    segment = torch.full((n,), OUTSIDE) if segment is None else segment
    return Tokens(slot, torch.full((n,), TEXT), slot, segment, torch.full((n,), -1))
