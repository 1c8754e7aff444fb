"""Layouts: who may see whom, and until when.

A static compression method is described once, as a typed token sequence with positions and a
rule of visibility. Two executions follow from that single description:

* ``Layout.visible`` over everything is the **mask** of the one-pass execution;
* ``Layout.last_query`` is the **eviction rule** of the streamed execution: an entry leaves the
  cache as soon as no later query may see it.

Both executions must give the same logits; the test-suite checks this for every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

RAW, OPEN, CLOSE, COMP, SUM = 0, 1, 2, 3, 4
"""Kinds of tokens: a token of the text; a sentinel that opens a span, one that closes it; a token whose
entry becomes memory; the address of an entry that is computed from other entries."""

OUTSIDE = -1
"""The unit of a token that belongs to no span."""

_ROWS_AT_ONCE = 1024


class Tokens(NamedTuple):
    """Typed tokens as int64 tensors of one shape (or broadcastable ones).

    Attributes:
        slot: place in the fed sequence, sentinels included.
        kind: ``RAW``, ``OPEN``, ``CLOSE``, ``COMP`` or ``SUM``.
        raw: number of the token in the text; for other kinds, that of the token whose place it shares.
        unit: the span or chunk the token belongs to, ``OUTSIDE`` if none.
        row: row of the adapter's embeddings that feeds it; -1 for text.
    """

    slot: Tensor
    kind: Tensor
    raw: Tensor
    unit: Tensor
    row: Tensor

    def at(self, where: Tensor | slice) -> Tokens:
        return Tokens(*(field[where] for field in self))

    def as_queries(self) -> Tokens:
        """Shape ``[q, 1]``, to broadcast against keys of shape ``[k]``."""
        return Tokens(*(field[:, None] for field in self))


class TextStructure(NamedTuple):
    """What a layout may know of the text besides its length.

    Attributes:
        chunks: lengths of the pieces that arrive one after another, such as the turns of a
            dialogue; empty for running text.
        words: for every token its line, its word in that line, and the words of that line; None
            unless the method asks for them.
        prefix: tokens that are read before the model writes the rest, at whose end the ratio is
            met exactly; 0 where all of the text is read.
    """

    chunks: tuple[int, ...] = ()
    words: tuple[tuple[int, int, int], ...] | None = None
    prefix: int = 0


RUNNING = TextStructure()
"""Running text, of which only the length is known."""

Visibility = Callable[[Tokens, Tokens], Tensor]
"""``(queries [q, 1], keys [k]) -> bool [q, k]``. Causality and self-visibility are added by the
layout, so that it only says what a query may see among the tokens *before* it."""


def everything(queries: Tokens, keys: Tokens) -> Tensor:
    """The visibility in the uncompressed cache."""
    return (keys.slot <= queries.slot) | True


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Entries that are computed from other entries of their layer, not from a token.

    Keys and values of each of the ``slots`` are a weighted sum of those of its sources. Sources
    come earlier in the fed sequence and may be mixed themselves (a running mean needs only the
    previous mean and the new entry), and the visibility lets a ``SUM`` token see them, which is what
    keeps them in the cache until then.

    Attributes:
        slots: int64 ``[m]``, ascending.
        sources: int64 ``[m, s]``.
        weights: float32 ``[m, s]``; 0 where a slot has fewer than s sources.
        unrotated: keys are averaged before the rotary embedding, and rotated to the place of the
            slot; otherwise as they are in the cache, each rotated to its own place.
    """

    slots: Tensor
    sources: Tensor
    weights: Tensor
    unrotated: bool = False

    def among(self, first: int, present: Tensor) -> tuple[Tensor, Tensor]:
        """How to mix once the slots from ``first`` on have been fed.

        Args:
            present: int64, the slots in the cache, ascending.

        Returns:
            Places among ``present`` that are mixed now ``[m]``, and their weights over all places
            ``[m, present]``, with chains of mixed sources followed to their ends.
        """
        chosen = (self.slots >= first) & (self.slots <= int(present[-1]))
        places = torch.searchsorted(present, self.slots[chosen])
        weights = torch.zeros(len(places), len(present))
        weights.scatter_add_(1, torch.searchsorted(present, self.sources[chosen]), self.weights[chosen])
        inner = weights[:, places]
        weights[:, places] = 0
        unit = torch.eye(len(places))
        return places, torch.linalg.solve_triangular(unit - inner, weights, upper=False, unitriangular=True)


@dataclass(frozen=True, eq=False)
class Layout:
    """A typed token sequence for one block of ``n_raw`` text tokens.

    Attributes:
        tokens: the fed sequence, ``T`` tokens, sentinels included.
        position: int64 ``[T]``, the position id that each token is fed with.
        visibility: who may see whom among earlier tokens.
        n_raw: number of text tokens in the block.
        next_unit: unit of the text that follows the block.
        mixture: how the ``SUM`` entries are computed; None if there are none.
        predictors: int64 ``[n_raw]``, the slot whose logits predict the token after each text
            token; None for the text tokens themselves.
    """

    tokens: Tokens
    position: Tensor
    visibility: Visibility
    n_raw: int
    next_unit: int = OUTSIDE
    mixture: MergePlan | None = None
    predictors: Tensor | None = None

    def __len__(self) -> int:
        return int(self.position.shape[0])

    @property
    def is_plain(self) -> bool:
        """Whether this is ordinary causal attention over the text alone."""
        return self.visibility is everything and len(self) == self.n_raw

    @cached_property
    def raw_slots(self) -> Tensor:
        """int64 ``[n_raw]``: where the text tokens are in the fed sequence."""
        return torch.nonzero(self.tokens.kind == RAW).flatten()

    @cached_property
    def read_slots(self) -> Tensor:
        """int64 ``[n_raw]``: the slot whose logits predict the token after each text token."""
        return self.raw_slots if self.predictors is None else self.predictors

    @cached_property
    def source(self) -> Tensor:
        """int64 ``[T]``: row of the table [text tokens; the adapter's rows] that feeds each slot."""
        kind, raw = self.tokens.kind, self.tokens.raw
        return torch.where(kind == RAW, raw, self.n_raw + self.tokens.row)

    @cached_property
    def special_slots(self) -> Tensor:
        """int64: where the tokens that are not text are in the fed sequence."""
        return torch.nonzero(self.tokens.kind != RAW).flatten()

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
    def last_query(self) -> Tensor:
        """int64 ``[T]``: the last slot that may see each entry; ``T`` if a token that followed
        the block could still see it. This is the eviction rule."""
        size = len(self)
        last, open_ = torch.arange(size), torch.arange(size)
        # From the end: a key that a later row sees needs no earlier one, so that windows cost what they hold.
        for start in reversed(range(0, size, _ROWS_AT_ONCE)):
            rows = torch.arange(start, min(start + _ROWS_AT_ONCE, size))
            keys = open_[open_ <= int(rows[-1])]
            number = torch.arange(1, len(rows) + 1, dtype=torch.int16)[:, None]
            seen = (self.visible(rows, keys) * number).amax(dim=0).long()
            last[keys] = torch.where(seen > 0, start + seen - 1, last[keys])
            open_ = keys[seen == 0]
        every = self.tokens.at(slice(None))
        following = Tokens(*(torch.tensor([v]) for v in (size, RAW, self.n_raw, self.next_unit, -1)))
        return torch.where(self.visibility(following.as_queries(), every)[0], size, last)

    def held_after(self, fed: int) -> Tensor:
        """int64: the slots that stay in the cache once the first ``fed`` tokens were read."""
        return torch.nonzero(self.last_query[:fed] >= fed).flatten()

    @cached_property
    def visible_before(self) -> Tensor:
        """int64 ``[n_raw]``: how many earlier entries are seen where the token after each text token
        is predicted (that place itself excluded)."""
        counts = []
        every = torch.arange(len(self))
        for rows in torch.split(self.read_slots, _ROWS_AT_ONCE):
            counts.append(self.visible(rows, every).sum(dim=1) - 1)
        return torch.cat(counts)


def plain_tokens(n: int, unit: Tensor | None = None) -> Tokens:
    """``n`` text tokens without sentinels; ``unit`` marks groups (default: none)."""
    slot = torch.arange(n)
    unit = torch.full((n,), OUTSIDE) if unit is None else unit
    return Tokens(slot, torch.full((n,), RAW), slot, unit, torch.full((n,), -1))
