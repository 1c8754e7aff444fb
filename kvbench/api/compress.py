"""Compression of a model that the user has loaded himself, around its own ``generate``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from kvbench.api.checks import check_model, check_request, checked_adapter, checked_method
from kvbench.api.compressed_model import CompressedModel
from kvbench.inference.compressed_cache import PREFILL, Compression
from kvbench.methods import Method
from kvbench.models.attention import register


@contextmanager
def compress(
    model: nn.Module, method: str | Method, ratio: float | str | Fraction | None = None, *,
    budget_tokens: int | None = None, adapter: str | Path | None = None, during: str = PREFILL,
    interval: int | None = None, seed: int = 0, **options: Any,
) -> Iterator[CompressedModel]:
    """Compress the cache of a model within the block, around its own ``generate``.

    Entries are really removed. Left-padded rows keep what they would keep alone, ``kept(n, ratio)`` of their own n
    tokens. On leaving, the model is as it was.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        method: name of a method, such as ``snapkv`` (``kvbench list methods``), or a method object.
        ratio: share of entries to remove, in [0, 1).
        budget_tokens: entries to keep per layer and head, instead of a ratio.
        adapter: folder of the adapter of a trained method.
        during: remove entries after the prompt has been read (``prefill``), while tokens are generated (``decode``), or
            ``both``.
        interval: tokens between two removals while tokens are generated; the option ``step`` of the method.
        seed: of random layouts and draws.
        options: of the method, such as ``window=64``.

    Raises:
        UserError: the request cannot be carried out on this model; nothing has been changed.
    """
    check_request(model, during, seed)
    made = checked_method(method, ratio, budget_tokens, options if interval is None else {**options, "step": interval})
    own: Any = model
    attention = _attention_of(own.config)
    names = ("generate", "forward")
    before: dict[str, Any] = {name: vars(model)[name] for name in names if name in vars(model)}
    original = {name: getattr(model, name) for name in names}
    own.set_attn_implementation(register())
    try:
        check_model(model, made)
        run = CompressedModel(Compression(model, made, checked_adapter(model, made, adapter), during, seed), original)
        for name, function in original.items():
            vars(model)[name] = _standing_in(function, getattr(run, name))
        try:
            yield run
        finally:
            run.is_open = False
    finally:
        for name in original:
            vars(model).pop(name, None)
        vars(model).update(before)
        own.set_attn_implementation(attention)


def _standing_in(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Our function under the name and signature of the model's own, which transformers looks at."""
    @functools.wraps(original)
    def call(*args: Any, **given: Any) -> Any:
        return ours(*args, **given)

    return call


def _attention_of(config: Any) -> str | dict[str, Any]:
    """The attention of a model, and of its parts where they have configurations of their own."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    found = {name: _attention_of(part) for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **found} if found else str(config._attn_implementation)
