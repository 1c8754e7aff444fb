"""One forward pass over a context for many policies, which choose from the same entries once it has been read.

All policies that compress a context at its end see the same keys, values and queries, so that nothing changes if these
are computed once. What differs are the statistics that they need; policies with the same needs share them, too, and so
do the ratios of one policy. Each session then goes on with a copy; so does the full cache, which keeps all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvbench.cache.policy_cache import PolicyLayer
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.policy_session import PolicySession
from kvbench.inference.session import Session
from kvbench.methods.policies.policy import CachePolicy, Needs
from kvbench.models.attention_hooks import OBSERVER

Key = tuple[Needs, int, int, int]
"""What a policy needs: statistics, last queries, how many of the first keys are rotated again, and how many of the
first queries are left out of the statistics."""


class SharedContext:
    """The entries of a context ``[batch, n]`` as all policies of a set see them, read when they are first wanted.

    Attributes:
        chunk: number of tokens that are fed at a time.
        passes: times that the context was read so far.
    """

    def __init__(self, model: nn.Module, ids: Tensor, sessions: Sequence[Session], chunk: int | None = None) -> None:
        self.model, self.ids, self.passes, self.chunk = model, ids, 0, chunk or ids.shape[1]
        self.readers: dict[Key, PolicySession] = {}
        self.logits = torch.empty(0)
        for session in sessions:
            if can_share(session):
                self.readers.setdefault(_key(session.policy), _reader(session))

    def read_into(self, session: Session) -> Tensor:
        """Read the context for a session that has just been opened, and let it compress; alone if it must be.

        Returns:
            Logits ``[batch, 1, vocabulary]`` after the context.
        """
        if not (can_share(session) or (self.readers and keeps_whole(session))):
            self.passes += 1
            *_, part = session.prefill(self.ids, self.ids.shape[1] - 1)
            return part.logits[:, -1:]
        if not self.logits.numel():
            self.passes += 1
            try:
                self.logits = self._read()
            except BaseException:  # what has been seen of the queries must not be counted twice by another try
                self.readers = {key: _reader(reader) for key, reader in self.readers.items()}
                raise
        if can_share(session):
            session.take_over(self.readers[_key(session.policy)])
            session.remove()
        elif keeps_whole(session):
            first = next(iter(self.readers.values()))
            session.take_over((layer.keys.clone(), layer.values.clone()) for layer in first.cache.layers)
        return self.logits

    def _read(self) -> Tensor:
        reading = _Reading(list(self.readers.values()))
        for start in range(0, self.ids.shape[1], self.chunk):
            logits = reading.feed(self.model, self.ids[:, start : start + self.chunk])
        return logits


def can_share(session: Session) -> TypeGuard[PolicySession]:
    """Whether a session compresses a context once, at its end, and leaves the model as it is."""
    if not isinstance(session, PolicySession) or session.chunk is None or not session.compresses_context:
        return False
    return type(session.policy).patched is CachePolicy.patched


def keeps_whole(session: Session) -> TypeGuard[LayoutSession]:
    """Whether a session holds what every policy of a shared context reads: all entries of the model as it is."""
    return type(session) is LayoutSession and session.layout.is_plain and session.reader.adapter is None


def _key(policy: CachePolicy) -> Key:
    return policy.needs, policy.window, policy.rerotated, policy.sinks if policy.needs.moments else 0


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

    def feed(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Read the next tokens ``[batch, m]`` and return the logits ``[batch, 1, vocabulary]`` after them."""
        count, read = ids.shape[1], self.readers[0].read
        for reader in self.readers:
            reader.begin(count)
        token = OBSERVER.set(self)
        try:
            out = model(
                input_ids=ids, attention_mask=torch.ones(1, 1, count, 1, dtype=torch.bool, device=ids.device),
                position_ids=torch.arange(read, read + count, device=ids.device)[None], use_cache=True,
                past_key_values=self, logits_to_keep=1,
            )
        finally:
            OBSERVER.reset(token)
        for reader in self.readers:
            reader.end(count)
        logits: Tensor = out.logits
        return logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.readers[0].read

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        first: PolicyLayer | None = None
        for reader in self.readers:  # the same tensors in all of them: nothing is changed in place before it is copied
            layers = reader.cache.layers
            layers += [PolicyLayer() for _ in range(layer_idx + 1 - len(layers))]
            layer = layers[layer_idx]
            if first is None:
                first = layer
                first.extend(key_states, value_states, reader.read)
            else:
                layer.lazy_initialization(key_states, value_states)
                layer.keys, layer.values, layer.read = first.keys, first.values, first.read
        assert first is not None, "somebody reads"
        return first.keys, first.values

    def mask(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        return self.readers[0].mask(layer, query, keys, values)

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        return None

    def observe(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        for reader in self.readers:
            reader.observe(layer, query, keys, scaling)
