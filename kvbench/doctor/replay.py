"""Applies a policy's choices twice: by removing entries while text is read, and by masking them in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbench.cache.policy_cache import PolicyCache
from kvbench.inference.policy_session import PolicySession
from kvbench.methods.policies.policy import CachePolicy
from kvbench.models.attention_hooks import OBSERVER


class BothWays(NamedTuple):
    """Logits ``[batch, n, vocabulary]`` with entries removed and with them masked, and the final cache."""

    removed: Tensor
    masked: Tensor
    cache: PolicyCache


def removed_and_masked(model: Any, policy: CachePolicy, ids: Tensor) -> BothWays:
    """Read a text under a policy, and again in one pass under a mask of what the policy kept.

    Args:
        policy: one that changes no entries and no positions, so that a mask is equivalent.
        ids: int64 ``[batch, n]``.
    """
    run, runs, parts = PolicySession(model, policy, ids.shape[1], (3, 5), history=[]), [], []
    for part in run.prefill(ids):
        runs.append((part.start, part.stop))
        parts.append(part.logits)
    token = OBSERVER.set(_Replayed(run, runs, ids.shape[1]))
    try:
        masked = model(
            input_ids=ids, use_cache=False,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
            position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
        ).logits
    finally:
        OBSERVER.reset(token)
    return BothWays(torch.cat(parts, 1), masked, run.cache)


class _Replayed:
    """An observer that masks one pass: each run of tokens sees what was kept before it, and itself causally."""

    def __init__(self, run: PolicySession, runs: list[tuple[int, int]], length: int) -> None:
        assert run.history is not None
        self.masks = [_mask_of(run.history, layer, runs, length) for layer in range(len(run.cache.layers))]

    def mask(self, layer: int, *_: Any) -> Tensor:
        return self.masks[layer]

    def attend(self, *_: Any) -> None:
        """Nothing: the model attends under the mask."""

    def observe(self, *_: Any) -> None:
        """Nothing is recorded."""


def _mask_of(kept: list[list[Tensor]], layer: int, runs: list[tuple[int, int]], length: int) -> Tensor:
    """The mask of a layer, bool ``[batch, heads, length, length]``."""
    batch, heads = kept[-1][layer].shape[:2]
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool, device=kept[-1][layer].device)
    for number, (start, stop) in enumerate(runs):
        if number:
            places = kept[number][layer]
            seen = torch.zeros(batch, heads, length + 1, dtype=torch.bool, device=mask.device)
            seen.scatter_(-1, places.masked_fill(places < 0, length), True)
            mask[:, :, start:stop] |= seen[:, :, None, :length]
        mask[:, :, start:stop, start:stop] |= torch.ones(
            stop - start, stop - start, dtype=torch.bool, device=mask.device
        ).tril()
    return mask
