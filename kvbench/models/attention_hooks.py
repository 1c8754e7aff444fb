"""What looks on while a model attends: who decides its masks, who is told of its calls. Without transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class AttentionObserver(Protocol):
    """Is shown what every layer attends with, once its new entries are stored."""

    def mask(self, layer: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """bool ``[queries, keys]`` or ``[batch, heads or query heads, queries, keys]``; None for all, causally."""

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        """The output ``[batch, query heads, q, width]``, where the observer attends by itself; None otherwise."""

    def observe(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """Rotated queries ``[batch, query heads, q, d]`` of a layer, and the keys that they attended."""


OBSERVER: ContextVar[AttentionObserver | None] = ContextVar("observer", default=None)
"""Who decides the mask of every layer by itself and sees its queries; the model's own mask is then not used. Layers
that hold different numbers of entries have no mask in common."""


@contextmanager
def unwatched() -> Iterator[None]:
    """Without a observer, for a model that is asked something while others use it."""
    token = OBSERVER.set(None)
    try:
        yield
    finally:
        OBSERVER.reset(token)


class Attended(NamedTuple):
    """What a layer attended: rotated ``query`` ``[batch, query heads, q, d]``, ``key`` and ``value``
    ``[batch, heads, entries, width]``, the names of what else took part, the ``mask`` that the model gave, and
    whether the layer is causal where it gave none."""

    layer: int | None
    query: Tensor
    key: Tensor
    value: Tensor
    beside: tuple[str, ...]
    mask: Tensor | None
    is_causal: bool


LISTENER: ContextVar[Callable[[Attended], None] | None] = ContextVar("listener", default=None)
"""Is told of every call of the attention."""

Rule = Callable[..., Any]
"""``(row, head, query, key) -> bool``: by what the model itself makes a mask."""

MASKS: ContextVar[list[tuple[Rule, Tensor]] | None] = ContextVar("masks", default=None)
"""Collects the rules by which the model makes its masks, and the masks, none of them left out."""
