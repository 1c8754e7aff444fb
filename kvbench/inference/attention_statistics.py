"""Statistics of a layer's queries that policies need: attention received per entry, moments, and the last queries."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.models.rope import rotated

QUERIES_AT_ONCE = 64
"""Number of queries whose attention is computed at a time."""


def received_attention(
    query: Tensor, keys: Tensor, scaling: float, positions: Tensor, decay: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Causal attention that entries receive from the last queries, summed over queries and query heads.

    Args:
        query: ``[batch, query heads, q, d]``, of the last q entries.
        keys: ``[batch, heads, entries, d]``.
        positions: int64 ``[batch, heads, entries]``; negative where there is no entry.
        decay: factor applied to the attention of a query for every query after it.
        bias: ``[batch, heads, entries]``, added to the logits; None for nothing.

    Returns:
        float32 ``[batch, heads, entries]``.
    """
    batch, heads, entries, width = keys.shape
    count = query.shape[2]
    grouped = query.reshape(batch, heads, -1, count, width).float()
    spread = keys.float().transpose(-1, -2)
    total = torch.zeros(batch, heads, entries, device=keys.device)
    place = torch.arange(entries, device=keys.device)
    none = (positions < 0)[:, :, None, None]
    for start in range(0, count, QUERIES_AT_ONCE):
        part = grouped[:, :, :, start : start + QUERIES_AT_ONCE]
        own = torch.arange(start, start + part.shape[3], device=keys.device)
        seen = slice(entries - count + start + part.shape[3])  # later entries are hidden from all of them
        hidden = (place[seen] > own[:, None] + entries - count) | none[..., seen]
        logits = (part.flatten(2, 3) @ spread[..., seen]).mul_(scaling).view(*part.shape[:4], -1)
        if bias is not None:
            logits += bias[:, :, None, None, seen]
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1).sum(2)
        if decay != 1:
            weights *= decay ** (count - 1 - own)[:, None]
        total[..., seen] += weights.sum(2)
    return total


def with_queries(before: Tensor | None, query: Tensor, count: int) -> Tensor:
    """Append ``query`` to the queries ``before``, and return a copy of the last ``count``."""
    joined = query if before is None else torch.cat([before, query], 2)
    return joined[:, :, -count:].clone()


def with_moments(
    before: tuple[int, Tensor, Tensor] | None, query: Tensor, first: int, skipped: int, inv_freq: Tensor | None
) -> tuple[int, Tensor, Tensor]:
    """Number, sum and sum of outer products of the queries so far, before the rotary embedding.

    Args:
        query: ``[batch, query heads, q, d]``, of the tokens from ``first`` on.
        skipped: number of first text tokens that are left out.
        inv_freq: inverse frequencies ``[d / 2]`` of the rotary embedding; None if there is none.
    """
    plain = query.float()
    if inv_freq is not None:
        places = torch.arange(first, first + query.shape[2], device=query.device)
        angle = places[:, None] * inv_freq.to(query.device)
        plain = rotated(plain, angle.cos(), -angle.sin())
    plain = plain[:, :, max(0, skipped - first) :]
    found = plain.shape[2], plain.sum(2), plain.transpose(-1, -2) @ plain
    return found if before is None else (before[0] + found[0], before[1] + found[1], before[2] + found[2])
