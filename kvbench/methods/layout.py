"""Layouts: who may see whom, and until when.

A static compression method is described once, as a typed token sequence with positions and a
visibility policy. Two executions follow from that single description:

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

RAW, OPEN, CLOSE = 0, 1, 2
"""Kinds of tokens: a token of the text, a sentinel that opens a span, one that closes it."""

OUTSIDE = -1
"""The unit of a token that belongs to no span."""

_ROWS_AT_ONCE = 1024


class Tokens(NamedTuple):
    """Typed tokens as int64 tensors of one shape (or broadcastable ones).

    Attributes:
        slot: place in the fed sequence, sentinels included.
        kind: ``RAW``, ``OPEN`` or ``CLOSE``.
        raw: number of the token in the text; for a sentinel, that of the token before it.
        unit: the span or group the token belongs to, ``OUTSIDE`` if none.
    """

    slot: Tensor
    kind: Tensor
    raw: Tensor
    unit: Tensor

    def at(self, where: Tensor | slice) -> Tokens:
        return Tokens(*(field[where] for field in self))

    def as_queries(self) -> Tokens:
        """Shape ``[q, 1]``, to broadcast against keys of shape ``[k]``."""
        return Tokens(*(field[:, None] for field in self))


Policy = Callable[[Tokens, Tokens], Tensor]
"""``(queries [q, 1], keys [k]) -> bool [q, k]``. Causality and self-visibility are added by the
layout, so a policy only says what a query may see among the tokens *before* it."""


def everything(queries: Tokens, keys: Tokens) -> Tensor:
    """The policy of the uncompressed cache."""
    return (keys.slot <= queries.slot) | True


@dataclass(frozen=True, eq=False)
class Layout:
    """A typed token sequence for one block of ``n_raw`` text tokens.

    Attributes:
        tokens: the fed sequence, ``T`` tokens, sentinels included.
        position: int64 ``[T]``, the position id that each token is fed with.
        policy: who may see whom among earlier tokens.
        n_raw: number of text tokens in the block.
    """

    tokens: Tokens
    position: Tensor
    policy: Policy
    n_raw: int

    def __len__(self) -> int:
        return int(self.position.shape[0])

    @property
    def is_plain(self) -> bool:
        """Whether this is ordinary causal attention over the text alone."""
        return self.policy is everything and len(self) == self.n_raw

    @cached_property
    def raw_slots(self) -> Tensor:
        """int64 ``[n_raw]``: where the text tokens are in the fed sequence."""
        return torch.nonzero(self.tokens.kind == RAW).flatten()

    @cached_property
    def source(self) -> Tensor:
        """int64 ``[T]``: row of the table [text tokens; OPEN; CLOSE] that feeds each slot."""
        kind, raw = self.tokens.kind, self.tokens.raw
        return torch.where(kind == RAW, raw, self.n_raw + kind - OPEN)

    @cached_property
    def special_slots(self) -> Tensor:
        """int64: where the sentinels are in the fed sequence."""
        return torch.nonzero(self.tokens.kind != RAW).flatten()

    @cached_property
    def mask(self) -> Tensor:
        """bool ``[T, T]``: the mask of the one-pass execution, True where attention is allowed."""
        every = torch.arange(len(self))
        return self.visible(every, every)

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool ``[q, k]``: which of the slots ``keys`` each of the slots ``queries`` may see."""
        q, k = self.tokens.at(queries).as_queries(), self.tokens.at(keys)
        return (self.policy(q, k) & (k.slot < q.slot)) | (k.slot == q.slot)

    @cached_property
    def last_query(self) -> Tensor:
        """int64 ``[T]``: the last slot that may see each entry; ``T`` if a token that followed
        the block could still see it. This is the eviction rule."""
        size = len(self)
        last = torch.arange(size)
        every = self.tokens.at(slice(None))
        for start in range(0, size, _ROWS_AT_ONCE):
            rows = torch.arange(start, min(start + _ROWS_AT_ONCE, size))
            seen = self.visible(rows, torch.arange(size))
            last = torch.maximum(last, torch.where(seen, rows[:, None], 0).amax(dim=0))
        following = Tokens(*(torch.tensor([v]) for v in (size, RAW, self.n_raw, OUTSIDE)))
        return torch.where(self.policy(following.as_queries(), every)[0], size, last)

    def held_after(self, fed: int) -> Tensor:
        """int64: the slots that stay in the cache once the first ``fed`` tokens were read."""
        return torch.nonzero(self.last_query[:fed] >= fed).flatten()

    @cached_property
    def visible_before(self) -> Tensor:
        """int64 ``[n_raw]``: how many earlier entries each text token sees (itself excluded)."""
        counts = []
        every = torch.arange(len(self))
        for rows in torch.split(self.raw_slots, _ROWS_AT_ONCE):
            counts.append(self.visible(rows, every).sum(dim=1) - 1)
        return torch.cat(counts)


def plain_tokens(n: int, unit: Tensor | None = None) -> Tokens:
    """``n`` text tokens without sentinels; ``unit`` marks groups (default: none)."""
    slot = torch.arange(n)
    unit = torch.full((n,), OUTSIDE) if unit is None else unit
    return Tokens(slot, torch.full((n,), RAW), slot, unit)
