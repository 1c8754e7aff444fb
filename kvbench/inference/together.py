"""One forward pass for the next tokens of several sessions, whose rows hold different entries or have read texts of
unequal length.

Everything but attention is computed for all rows at once; in every layer, each session stores and attends the entries
of its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.policy_session import PolicySession
from kvbench.inference.session import Session
from kvbench.models.attention import masked_attention
from kvbench.models.attention_hooks import OBSERVER

Joining: TypeAlias = PolicySession | LayoutSession


def can_join(session: Session) -> TypeGuard[Joining]:
    """Whether the next tokens of a session can be fed together with those of others that change the model alike.

    A layout's can if it reads nothing but text. The model must be one that policies can be used on, since each session
    then attends its own entries.
    """
    if type(session) is LayoutSession:
        return not len(session.layout.special_slots)
    return isinstance(session, PolicySession) and not session.policy.keeps_all


class Together(Cache):  # type: ignore[misc]
    """Hands keys, values and queries of a batch to the sessions of its rows; the cache and the observer of one pass.

    Attributes:
        members: rows of the batch, int64, and the session that reads them.
    """

    def __init__(self, model: nn.Module, members: Sequence[tuple[Tensor, Joining]]) -> None:
        super().__init__(layers=[])
        self.model, self.members = model, members
        self.attended: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def extend(self, ids: Tensor) -> Tensor:
        """Read text ``[batch, m]`` after the contexts without compressing it; logits ``[batch, 1, vocabulary]``."""
        with ExitStack() as stack:
            for _, session in self.members:
                stack.enter_context(session.kept_whole())
            return self.feed(ids, removes=False)

    def expand(self, copies: int) -> None:
        """Repeat every row ``copies`` times, copies of a row next to each other."""
        for _, session in self.members:
            session.expand(copies)
        self.members = [(repeated(rows, copies), session) for rows, session in self.members]

    def step(self, ids: Tensor) -> Tensor:
        """Read one generated token per row, int64 ``[rows]``, and return logits ``[rows, vocabulary]``."""
        return self.feed(ids[:, None], removes=True)[:, -1]

    def feed(self, ids: Tensor, removes: bool) -> Tensor:
        """Read the next tokens ``[batch, m]`` of all rows and return the logits after them, ``[batch, 1, vocabulary]``.

        Args:
            removes: let the sessions remove entries afterwards where that is due.
        """
        count, positions = ids.shape[1], torch.empty_like(ids)
        for rows, session in self.members:
            positions[rows] = session.begin(count).to(ids.device)
        token = OBSERVER.set(self)
        try:
            with self.members[0][1].patched():
                out = self.model(
                    input_ids=ids, attention_mask=torch.ones(1, 1, count, 1, dtype=torch.bool, device=ids.device),
                    position_ids=positions, use_cache=True, past_key_values=self, logits_to_keep=1,
                )
        finally:
            OBSERVER.reset(token)
        for _, session in self.members:
            session.end(count)
            if removes:
                session.settle()
        logits: Tensor = out.logits
        return logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(session.read for _, session in self.members)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.attended[layer_idx] = [
            session.cache.update(key_states[rows], value_states[rows], layer_idx) for rows, session in self.members
        ]
        return key_states, value_states

    def mask(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        return None

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        """Attention ``[batch, query heads, q, width]``, each session over its own entries."""
        out: Tensor | None = None
        for (rows, session), (keys, values) in zip(self.members, self.attended.pop(layer), strict=True):
            mine = query[rows]
            found = session.attend(layer, mine, scaling)
            if found is None:
                mask = session.mask(layer, mine, keys, values)
                found = masked_attention(mask, mine, keys, values, scaling)
            session.observe(layer, mine, keys, mine.shape[-1] ** -0.5 if scaling is None else scaling)
            if out is None:
                out = found.new_empty(len(query), *found.shape[1:])
            out[rows] = found
        return out

    def observe(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """Nothing: sessions have observed their own rows."""


def repeated(rows: Tensor, copies: int) -> Tensor:
    """The rows of a batch in which every row is repeated, copies of a row next to each other."""
    return (rows[:, None] * copies + torch.arange(copies, device=rows.device)).flatten()
