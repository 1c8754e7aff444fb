"""What a model's masks allow: whether tokens attend later ones, and how long a text is attended in full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.models.attention_hooks import AttentionCall, MaskFunction
from kvbench.models.configuration import text_config

MODEL_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""Exceptions that a model may raise when it is used in a way that it does not support."""


def sees(call: AttentionCall, later: Tensor) -> bool:
    """Whether a query of the call attends a later key; ``later`` marks them, bool ``[queries, keys]``."""
    if call.mask is None:
        return not call.is_causal
    open_ = call.mask if call.mask.dtype == torch.bool else call.mask > -1e4
    return open_.shape[-2:] == later.shape and bool((open_ & later).any())


def attention_span(rules: list[MaskFunction], longest: int) -> int | None:
    """Length of the longest text whose last token sees all of it under every rule; None if it exceeds ``longest``.

    Args:
        rules: mask functions of transformers, ``(batch, head, query, key) -> bool``.
    """
    found = [bound for rule in rules if (bound := _bound(rule, longest)) is not None]
    return min(found, default=None)


def _bound(rule: MaskFunction, longest: int) -> int | None:
    def sees_all(length: int) -> bool:
        zero, last = torch.zeros(1, dtype=torch.long), torch.tensor([length - 1])
        return bool(torch.as_tensor(rule(zero, zero, last, torch.arange(length))).all())

    try:
        if sees_all(longest):
            return None
        low, high = 0, longest
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sees_all(middle) else (low, middle)
        return low
    except MODEL_ERRORS:
        return None  # the rule is bound to one text: the probe compares long texts instead


def setting_name(config: Any, value: int | None) -> str:
    """Name of the setting that has this value in the configuration; one with window or chunk in its name first."""
    content = {**config.to_dict(), **text_config(config).to_dict()}
    names = [name for name, found in content.items() if type(found) is int and found == value]
    return next((name for name in names if "window" in name or "chunk" in name), names[0] if names else "a window of")
