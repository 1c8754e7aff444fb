"""One forward pass over a context for many policies, which choose from the same entries once it has been read.

All policies that compress a context at its end see the same keys, values and queries, so that nothing changes if these
are computed once. What differs are the statistics that they need; policies with the same needs share them, too, and so
do the ratios of one policy. Each session then goes on with a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvbench.cache.policy_cache import PolicyLayer
from kvbench.inference.policy_session import PolicySession
from kvbench.inference.session import Session
from kvbench.methods.policies.policy import CachePolicy, Needs
from kvbench.models.attention_hooks import OBSERVER

Key = tuple[Needs, int, int]
"""What a policy needs: statistics, last queries, and how many of the first keys are rotated again."""


class SharedContext:
    """The entries of a context ``[batch, n]`` as all policies of a set see them, read when they are first wanted.

    Attributes:
        passes: forward passes over the context so far.
    """

    def __init__(self, model: nn.Module, ids: Tensor, sessions: Sequence[Session]) -> None:
        self.model, self.ids, self.passes = model, ids, 0
        self.readers: dict[Key, PolicySession] = {}
        for session in sessions:
            if can_share(session):
                self.readers.setdefault(_key(session.policy), _reader(session))

    def read_into(self, session: Session) -> None:
        """Read the context for a session that has just been opened, and let it compress; alone if it must be."""
        if not can_share(session):
            self.passes += 1
            for _ in session.prefill(self.ids, self.ids.shape[1]):
                pass
            return
        readers = list(self.readers.values())
        if not readers[0].read:
            self.passes += 1
            try:
                _Reading(readers).feed(self.model, self.ids)
            except BaseException:  # what has been seen of the queries must not be counted twice by another try
                self.readers = {key: _reader(reader) for key, reader in self.readers.items()}
                raise
        session.take_over(self.readers[_key(session.policy)])
        session.remove()


def can_share(session: Session) -> TypeGuard[PolicySession]:
    """Whether a session compresses a context once, at its end, and leaves the model as it is."""
    if not isinstance(session, PolicySession) or session.chunk is None or not session.compresses_context:
        return False
    return type(session.policy).patched is CachePolicy.patched


def _key(policy: CachePolicy) -> Key:
    return policy.needs, policy.window, policy.rerotated


def _reader(session: PolicySession) -> PolicySession:
    """A session with the same needs that only reads."""
    return PolicySession(
        session.model, session.policy, session.total, session.row_seeds, session.seed, session.chunk,
        compresses_context=False,
    )


class _Reading(Cache):  # type: ignore[misc]
    """Cache and observer of the one pass: the first session stores the entries, all of them see the queries."""

    def __init__(self, readers: Sequence[PolicySession]) -> None:
        super().__init__(layers=[])
        self.readers = readers

    def feed(self, model: nn.Module, ids: Tensor) -> None:
        count = ids.shape[1]
        for reader in self.readers:
            reader.begin(count)
        token = OBSERVER.set(self)
        try:
            model(
                input_ids=ids, attention_mask=torch.ones(1, 1, count, 1, dtype=torch.bool, device=ids.device),
                position_ids=torch.arange(count, device=ids.device)[None], use_cache=True, past_key_values=self,
                logits_to_keep=1,
            )
        finally:
            OBSERVER.reset(token)
        for reader in self.readers:
            reader.end(count)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if any(t.untyped_storage().nbytes() != t.nbytes for t in (key_states, value_states)):
            key_states, value_states = key_states.clone(), value_states.clone()  # views of a fused projection
        for reader in self.readers:  # the same tensors in all of them: nothing is changed in place before it is copied
            layers = reader.cache.layers
            layers += [PolicyLayer() for _ in range(layer_idx + 1 - len(layers))]
            layers[layer_idx].lazy_initialization(key_states, value_states)
            layers[layer_idx].replace(key_states, value_states)
            layers[layer_idx].read = key_states.shape[-2]
        return key_states, value_states

    def mask(self, layer: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
        return None

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        return None

    def observe(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        for reader in self.readers:
            reader.observe(layer, query, keys, scaling)
