"""SDPA, called in the way that is fastest under a dense mask.

A dense mask keeps SDPA from skipping the future, which doubles the work of a causal pass. For
scoring, the queries are fed in a few runs, each with the keys up to its end only, which gives
most of that back with the stock kernel. For training on a CPU the kernel is called in float32,
whose backward pass is faster there than that of bfloat16. Where transformers would copy keys and
values for every query head, because there is a mask, the CPU's kernel groups the heads itself.
Without a mask and without gradients this is SDPA, untouched.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvbench_sdpa"
RUNS = 4
"""Runs of queries; r of them do (r + 1) / 2r of the full square."""
SHORTEST = 128
"""Queries below which one call is cheaper than several."""


class Watcher(Protocol):
    """Is shown what every layer attends with, once its new entries are stored."""

    def mask(self, layer: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """bool ``[queries, keys]`` or ``[batch, heads or query heads, queries, keys]``; None for all, causally."""

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        """The output ``[batch, query heads, q, width]``, where the watcher attends by itself; None otherwise."""

    def watch(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """Rotated queries ``[batch, query heads, q, d]`` of a layer, and the keys that they attended."""


WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
"""Who decides the mask of every layer by itself and sees its queries; the model's own mask is then not used. Layers
that hold different numbers of entries have no mask in common."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **extra: Any
) -> tuple[Tensor, None]:
    """Attention of ``query`` ``[batch, heads, q, d]`` over keys and values, as transformers calls it.

    Returns:
        Output ``[batch, q, heads, d]``, and no weights.
    """
    watcher = WATCHER.get()
    if watcher is not None:
        return _watched(watcher, module, query, key, value, **extra), None
    if torch.is_grad_enabled() and query.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            out, _ = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), attention_mask, **extra
            )
        return out, None
    q, k = query.shape[2], key.shape[2]
    if attention_mask is None or attention_mask.dtype != torch.bool:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **extra)
        return out, None
    if 1 < q < SHORTEST and query.device.type == "cpu" and extra.get("softcap") is None:
        grouped = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=extra.get("scaling"), enable_gqa=True
        )
        return grouped.transpose(1, 2).contiguous(), None
    if q != k or q < SHORTEST:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **extra)
        return out, None
    parts = []
    for run in range(RUNS):
        start, stop = q * run // RUNS, q * (run + 1) // RUNS
        part, _ = sdpa_attention_forward(
            module, query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop],
            attention_mask[..., start:stop, :stop], **extra,
        )
        parts.append(part)
    return torch.cat(parts, dim=1), None


def _watched(watcher: Watcher, module: Any, query: Tensor, key: Tensor, value: Tensor, **extra: Any) -> Tensor:
    if extra.get("softcap") is not None or extra.get("s_aux") is not None:
        raise RuntimeError(f"{type(module).__name__} caps its attention or adds to it, which policies cannot follow")
    scaling, number = extra.get("scaling"), int(module.layer_idx)
    out = watcher.attend(number, query, scaling)
    if out is None:
        out = _masked(watcher.mask(number, query.shape[2], key.shape[2], query.device), query, key, value, scaling)
    watcher.watch(number, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous()


def _masked(mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    if mask is not None and mask.dim() == 4 and mask.shape[1] not in (1, query.shape[1]):
        mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        is_causal=mask is None and query.shape[2] > 1,
    )


def register() -> str:
    """Make the attention known to transformers, with SDPA's own mask function; returns its name."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
