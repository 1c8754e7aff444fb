"""Policies in one masked pass: those that look at keys and values only (:mod:`kvbench.methods.policies.masking`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kvbench.cache.shape import cache_shape
from kvbench.inference.policy_session import PolicySession
from kvbench.inference.session import Scored
from kvbench.methods.policies.masking import last_queries, mask_of
from kvbench.methods.policies.policy import CachePolicy
from kvbench.models.attention_hooks import OBSERVER


@dataclass
class PolicyMasks:
    """Makes the mask of every layer from its own keys and values, while it is computed.

    Attributes:
        layers: number of layers of the model.
        last: int64 ``[batch, heads, n]`` of every layer so far: the last token that may see each entry.
    """

    policy: CachePolicy
    layers: int
    row_seeds: Sequence[int]
    seed: int = 0
    last: list[Tensor] = field(default_factory=list)

    def mask(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if layer == len(self.last):  # the first layer that reads these entries
            self.last.append(last_queries(
                self.policy, keys, values, layer=layer, layers=self.layers,
                row_seeds=torch.tensor(list(self.row_seeds), device=keys.device), seed=self.seed,
            ))
        return mask_of(self.last[layer])

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        return None

    def observe(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """Nothing: queries make no difference."""


def masked_logits(model: nn.Module, policy: CachePolicy, ids: Tensor, wanted: slice) -> Tensor:
    """Logits ``[batch, wanted, vocabulary]`` of a text ``[batch, n]`` in one pass under the policy's masks.

    Gradients flow through keys and values that are seen, and not through the choice of them.
    """
    rows, n = ids.shape
    token = OBSERVER.set(PolicyMasks(policy, len(cache_shape(model).layers), [0] * rows))
    try:
        out = model(
            input_ids=ids, attention_mask=torch.ones(1, 1, n, 1, dtype=torch.bool, device=ids.device),
            position_ids=torch.arange(n, device=ids.device)[None], use_cache=False,
            logits_to_keep=torch.arange(n, device=ids.device)[wanted],
        )
    finally:
        OBSERVER.reset(token)
    logits: Tensor = out.logits
    return logits


@dataclass
class MaskedPolicySession(PolicySession):
    """Reads the context in one pass, with entries masked from the moment on at which they would have been removed; they
    are removed at its end."""

    masks: PolicyMasks | None = None

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        first, n = min(first, self.total), self.total
        self.masks = PolicyMasks(self.policy, len(cache_shape(self.model).layers), self.row_seeds, self.seed)
        logits = self.feed(ids, slice(first, None))
        places, hidden = torch.arange(n), torch.zeros(n)
        for layer, last in zip(self.cache.layers, self.masks.last, strict=True):
            shape = last.shape[:2]
            gone = torch.sort(last.flatten(0, 1).cpu(), -1).values  # before which token each entry is hidden
            counts = torch.searchsorted(gone, places.expand(len(gone), -1).contiguous())
            hidden += counts.double().mean(0).float() / len(self.masks.last)
            layer.choose(torch.nonzero(last == n)[:, -1].view(*shape, -1), layer.present(), None)
        self.seen = (places - hidden).tolist()
        self.masks, self.since, self.removed_at, self.removals = None, 0, self.read, self.removals + 1
        yield Scored(first, n, logits)

    def mask(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        if self.masks is not None:
            return self.masks.mask(layer, query, keys, values)
        return super().mask(layer, query, keys, values)
