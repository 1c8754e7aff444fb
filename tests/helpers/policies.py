"""Policies for short texts, what they keep, and the mask of one pass made of it."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.inference.policy_session import PolicySession
from kvbench.methods import METHODS, make_method
from kvbench.methods.policies.policy import CachePolicy, LayerView
from kvbench.models.attention_hooks import OBSERVER
from tests.helpers.models import VOCABULARY

POLICIES = [name for name, kind in METHODS.items() if issubclass(kind, CachePolicy) and not kind.adapter_kinds]
"""Those that need no adapter; trained ones: tests/methods/test_masking.py."""
LENGTH, BATCH = 96, 2


def policy_of(name: str, ratio: str = "0.6", **options: str) -> CachePolicy:
    """With windows that suit a short text."""
    usual = {
        "window": "8", "kernel": "3", "lag": "8", "positions": "absolute", "size": "4", "residual": "16",
        "group": "8", "recent": "8", "spread": "4", "future": "32",
    }
    ratio = "0.3" if name == "think" and ratio != "0" else ratio
    method = make_method(name, Fraction(ratio), {**usual, **options})
    assert isinstance(method, CachePolicy)
    return method


def text(length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(3))


def read(model: nn.Module, policy: CachePolicy, ids: Tensor, chunk: int | None = None) -> tuple[Tensor, PolicySession]:
    """Logits after every token, and the reading itself, with what it kept; at once, in chunks, if they are given."""
    run = PolicySession(model, policy, ids.shape[1], (3, 5), chunk=chunk, history=[])
    with torch.inference_mode():
        parts = [part.logits for part in run.prefill(ids)]
    return torch.cat(parts, 1), run


def seen_at(places: Tensor, length: int) -> Tensor:
    """bool ``[batch, heads, length]`` of places, of which negative ones are none."""
    seen = torch.zeros(*places.shape[:2], length + 1, dtype=torch.bool)
    return seen.scatter_(-1, places.masked_fill(places < 0, length), True)[..., :length]


def runs_of(policy: CachePolicy, length: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < length:
        stop = min(length, start + policy.run_length(start))
        yield start, stop
        start = stop


class Replayed:
    """The mask of one pass over everything: for each run of tokens, what was kept then, and the run itself."""

    def __init__(self, run: PolicySession, heads: int, length: int) -> None:
        assert run.history is not None
        self.masks = []
        for layer in range(len(run.cache.layers)):
            mask = torch.zeros(BATCH, heads, length, length, dtype=torch.bool)
            for number, (start, stop) in enumerate(runs_of(run.policy, length)):
                if number:
                    seen = seen_at(run.history[number][layer], length)
                    mask[:, :, start:stop] |= seen.repeat_interleave(heads // seen.shape[1], 1)[:, :, None]
                mask[:, :, start:stop, start:stop] |= torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            self.masks.append(mask)

    def mask(self, layer: int, *_: Any) -> Tensor:
        return self.masks[layer]

    def attend(self, *_: Any) -> None:
        pass

    def observe(self, *_: Any) -> None:
        pass


def masked(model: Any, run: PolicySession, ids: Tensor) -> Tensor:
    token = OBSERVER.set(Replayed(run, int(model.config.num_attention_heads), ids.shape[1]))
    try:
        with torch.inference_mode():
            out: Tensor = model(
                input_ids=ids, use_cache=False, attention_mask=torch.ones(1, 1, 1, 1).bool(),
                position_ids=torch.arange(ids.shape[1])[None],
            ).logits
        return out
    finally:
        OBSERVER.reset(token)


def view(entries: int = 24, seed: int = 0, **more: Any) -> LayerView:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 2, entries, 8, generator=generator) for _ in range(2))
    sums = torch.rand(2, 2, entries, generator=generator)
    queries = torch.randn(2, 4, 8, 8, generator=generator)
    places = torch.arange(entries).expand(2, 2, entries)
    fields = {"keys": keys, "values": values, "positions": places, "attention_sums": sums, "queries": queries, **more}
    return LayerView(**fields, scaling=0.4, read=entries, layer=0, layers=2, row_seeds=torch.tensor([3, 5]), seed=0)
