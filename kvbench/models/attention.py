"""The attention function of all models: SDPA, called in the way that is fastest under a dense mask.

Under a dense mask (a boolean per query and key), SDPA cannot skip later keys, which doubles the work of a causal pass.
For scoring, queries are therefore split into a few consecutive runs, each with the keys up to its end only, which
recovers most of the loss with the stock kernel. For training on a CPU the kernel runs in float32, whose backward pass
is faster there than that of bfloat16. Where transformers would repeat keys and values for every query head because
there is a mask, the CPU kernel handles grouped queries itself. Without a mask and without gradients this is
transformers' SDPA, unchanged. Attention with soft-capped logits or learned sinks, which SDPA does not support, is
computed here in plain PyTorch. A listener is told of every call; an observer gives the mask, or computes the attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvbench.models.attention_hooks import LISTENER, MASKS, OBSERVER, AttentionCall, AttentionObserver, MaskFunction
from kvbench.models.sharing import shares

NAME = "kvbench"
"""Must not contain "sdpa": transformers would refuse models with soft-capped logits, which are supported here."""
RUNS = 4
"""Number of runs that queries are split into; r runs compute (r + 1) / 2r of the full query-key square."""
SHORTEST = 128
"""Number of queries below which one kernel call is faster than several; ``_exact`` takes so many at a time."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **extra: Any
) -> tuple[Tensor, None]:
    """Attention of ``query`` ``[batch, query heads, q, d]`` over keys and values, with transformers' signature.

    Returns:
        Output ``[batch, q, query heads, d]``, and None in place of attention weights.
    """
    softcap, sinks = extra.get("softcap"), extra.get("s_aux")
    listener = LISTENER.get()
    if listener is not None and not shares(module):  # told of the layers that keep entries, as caches number them
        extra_terms = [name for name, term in (("softcap", softcap), ("s_aux", sinks)) if term is not None]
        listener(AttentionCall(
            getattr(module, "layer_idx", None), query, key, value, tuple(extra_terms), attention_mask,
            bool(getattr(module, "is_causal", True)),
        ))
    observer = OBSERVER.get()
    if observer is not None:
        return _watched(observer, module, query, key, value, **extra), None
    if softcap is not None or sinks is not None:
        return _exact(query, key, value, attention_mask, extra.get("scaling"), softcap, sinks), None
    if torch.is_grad_enabled() and query.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            out, _ = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), attention_mask, **extra
            )
        return out, None
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(query.dtype)
    q, k = query.shape[2], key.shape[2]
    is_dense = attention_mask is not None and attention_mask.dtype == torch.bool
    is_short = is_dense and 1 < q < SHORTEST and query.device.type == "cpu"
    if is_short or (attention_mask is None and _is_folded(query, key)):
        grouped = masked_attention(attention_mask, query, key, value, extra.get("scaling"))
        return grouped.transpose(1, 2).contiguous(), None
    if attention_mask is None or not is_dense or q != k or q < SHORTEST:
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


def _exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention ``[batch, q, heads, width]`` with logits soft-capped at ``softcap``; the softmax includes one learned
    sink logit per head, ``sinks`` ``[heads]``, which takes weight but adds nothing to the output."""
    batch, heads, count, width = query.shape
    group = heads // key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    out = query.new_empty(batch, count, heads, value.shape[-1])
    places = torch.arange(key.shape[2], device=query.device)
    for start in range(0, count, SHORTEST):
        rows = slice(start, min(start + SHORTEST, count))
        logits = (query[:, :, rows] @ keys.transpose(-1, -2)).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is None:
            last = torch.arange(count, device=query.device)[rows, None] + len(places) - count
            logits = logits.masked_fill(places > last, float("-inf"))
        elif mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask[:, :, rows], float("-inf"))
        else:
            logits = logits + mask[:, :, rows]
        if sinks is not None:
            extra_terms = sinks.float().view(1, -1, 1, 1).expand(batch, heads, logits.shape[2], 1)
            logits = torch.cat([logits, extra_terms], -1)
        weights = logits.softmax(-1)[..., : len(places)].to(value.dtype)
        out[:, rows] = (weights @ values).transpose(1, 2)
    return out


def _mask(*args: Any, mask_function: MaskFunction = causal_mask_function, **kwargs: Any) -> Tensor | None:
    """Make SDPA's own mask; while ``MASKS`` collects, make it always, and record it with its mask function."""
    collected = MASKS.get()
    if collected is not None:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(*args, mask_function=mask_function, **kwargs)
    if collected is not None and mask is not None:
        collected.append((mask_function, mask))
    return mask


def _watched(
    observer: AttentionObserver, module: Any, query: Tensor, key: Tensor, value: Tensor, **extra: Any
) -> Tensor:
    """Attention under the mask of an observer, or computed by it; then the observer is shown queries and keys."""
    if extra.get("softcap") is not None or extra.get("s_aux") is not None:
        raise RuntimeError(f"{type(module).__name__} caps its attention or adds to it, which policies cannot follow")
    scaling, number = extra.get("scaling"), int(module.layer_idx)
    out = observer.attend(number, query, scaling)
    if out is None:
        mask = observer.mask(number, query, key, value)
        if torch.is_grad_enabled() and query.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                out = masked_attention(mask, query.float(), key.float(), value.float(), scaling)
        else:
            out = masked_attention(mask, query, key, value, scaling)
    if not shares(module):  # entries are chosen by the queries of the layer that keeps them
        observer.observe(number, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous()


def masked_attention(mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attention ``[batch, query heads, q, width]`` under a mask, bool or added to the logits; causal if there is none.

    The mask's heads, if it has any, are those of the queries or of the keys.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    if mask is not None and mask.dim() == 4 and mask.shape[1] not in (1, query.shape[1]):
        mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
    if mask is None and _is_folded(query, key):
        return _folded(query, key, value, scaling)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        is_causal=mask is None and query.shape[2] > 1,
    )


def _is_folded(query: Tensor, key: Tensor) -> bool:
    """Whether this is a single token on a CPU in half precision, whose kernel takes several queries at a time: it is
    three to four times faster if the query heads of a group are its queries."""
    is_half = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    return is_half and query.shape[2] == 1 and query.shape[1] > key.shape[1]


def _folded(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attention of one token ``[batch, query heads, 1, width]`` with the heads of a group as queries of their head."""
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    out = functional.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return out.reshape(*query.shape[:2], 1, value.shape[-1])


def register() -> str:
    """Register this attention with transformers, with SDPA's own masks, and return its name."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Use the model's own eager attention instead of this module's, for the length of the block."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
