"""What a model's masks let its layers attend: whether what comes later, and how long a text in whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.models.attention_hooks import Attended, Rule
from kvbench.models.configuration import text_config

Faults = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What a model may raise when it is used in a way that it was not made for."""


def sees(call: Attended, later: Tensor) -> bool:
    """Whether a query of the call sees a key that comes later, where bool ``[queries, keys]`` says what does."""
    if call.mask is None:
        return not call.is_causal
    open_ = call.mask if call.mask.dtype == torch.bool else call.mask > -1e4
    return open_.shape[-2:] == later.shape and bool((open_ & later).any())


def sight_of(rules: list[Rule], longest: int) -> int | None:
    """The longest text whose last token sees all of it by every rule; None if that of ``longest`` tokens does.

    Args:
        rules: ``(row, head, query, key) -> bool``, as transformers makes masks by.
    """
    found = [bound for rule in rules if (bound := _bound(rule, longest)) is not None]
    return min(found, default=None)


def _bound(rule: Rule, longest: int) -> int | None:
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
    except Faults:
        return None  # a rule that is made for one text only: seen where texts are compared


def setting_of(config: Any, value: int | None) -> str:
    """What a configuration calls a number."""
    content = {**config.to_dict(), **text_config(config).to_dict()}
    names = [name for name, found in content.items() if type(found) is int and found == value]
    return next((name for name in names if "window" in name or "chunk" in name), names[0] if names else "a window of")
