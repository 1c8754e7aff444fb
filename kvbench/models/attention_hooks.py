"""Hooks into the attention of a model: an observer that sets masks, a listener to calls. Needs no transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class AttentionObserver(Protocol):
    """Sets the mask of every layer and sees its queries and keys, after the new entries were stored in the cache."""

    def mask(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        """bool, or float and added to the logits: ``[queries, keys]`` or ``[batch, heads or query heads, queries,
        keys]``; None for causal attention. Given are what is attended with, and the entries that are attended."""

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        """The output ``[batch, query heads, q, width]`` if the observer computes attention itself; None otherwise."""

    def observe(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """Receive rotated queries ``[batch, query heads, q, d]`` of a layer, and the keys that they attended."""


OBSERVER: ContextVar[AttentionObserver | None] = ContextVar("observer", default=None)
"""The active observer, if any. Its masks replace the model's own mask, which cannot serve layers with different
numbers of entries."""


@contextmanager
def without_observer() -> Iterator[None]:
    """Suspend the observer for the length of the block, so that the model can be probed inside a session."""
    token = OBSERVER.set(None)
    try:
        yield
    finally:
        OBSERVER.reset(token)


class AttentionCall(NamedTuple):
    """One attention call of a layer.

    Rotated ``query`` ``[batch, query heads, q, d]``, ``key`` and ``value`` ``[batch, heads, entries, width]``, names of
    additional terms in ``extra_terms`` (``softcap``, ``s_aux``), the model's ``mask``, and whether attention is causal
    if the mask is None.
    """

    layer: int | None
    query: Tensor
    key: Tensor
    value: Tensor
    extra_terms: tuple[str, ...]
    mask: Tensor | None
    is_causal: bool


LISTENER: ContextVar[Callable[[AttentionCall], None] | None] = ContextVar("listener", default=None)
"""Called with every attention call, if set."""

MaskFunction = Callable[..., Any]
"""A mask function of transformers, ``(batch, head, query, key) -> bool``."""

MASKS: ContextVar[list[tuple[MaskFunction, Tensor]] | None] = ContextVar("masks", default=None)
"""If set, collects the model's mask functions and the masks made from them; no mask is then replaced by None."""
