"""The two main guarantees on a GPU: streamed is one pass, for every layout; removed is masked, for every policy."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cells import Found
from benchmarks.gpu.workshop import Workshop, small_adapter
from kvbench.doctor.replay import removed_and_masked
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.memory_session import MemorySession
from kvbench.inference.policy_session import PolicySession
from kvbench.inference.reader import Reader
from kvbench.methods import LayoutMethod, Method, make_layout, make_method
from kvbench.methods.policies.policy import CachePolicy

TOLERANCES = {"float32": (1e-4, "logits"), "bfloat16": (0.1, "nats")}
"""How far two ways to the same numbers may lie apart: the largest difference of logits; in half precision, where
single ones mean little, the mean difference of the loss."""

BUDGET = {"budget": "40", "memory": "4", "compress": "16"}
WAYS: dict[str, tuple[dict[str, str], ...]] = {
    "sentinel": ({}, {"recent": "16"}, {"predict_from_cr": "true"}), "sinks": ({}, BUDGET),
    "ccm-concat": ({}, {"recurrent": "false"}, BUDGET), "gist": ({}, {"mode": "fixed"}),
    "ccm-merge": (
        {"segment": "16"}, {"segment": "16", "merge": "ema"}, {"segment": "16", "merge_at": "unrotated"},
        {**BUDGET, "memory": "2"},
    ),
    "meanpool": ({}, {"merge_at": "unrotated"}, {"count": "true"}), "pic": ({}, {"sees": "memory"}),
    "unigist": ({"window": "8"},), "unigist-tuned": ({"window": "8"},), "beacon": ({"window": "16"},),
}
"""Options that layouts are tried with, where the default alone would leave code unused."""
IN_CHUNKS = (
    "ccm-concat", "gist", "meanpool", "pic", "prompt", "icae", "comprexit", "ic-former", "autocompressors",
)
"""Layouts that compress chunks, which a short text has at few ratios only."""

SHORT = {
    "window": "8", "kernel": "3", "lag": "8", "size": "4", "residual": "16", "group": "8", "recent": "8",
    "spread": "4", "future": "32", "count": "false",
}
"""Options with which policies have something to do in a short text."""
KEEPS_POSITIONS = {"streaming-llm", "cascading"}
"""Policies that count positions in the cache, for which no mask could stand: told not to."""
CHANGING = ("cam", "d2o", "fp8", "kivi", "lorc", "subgen", "think")
"""Policies after which entries are not what was computed: compared with the cache of transformers."""


def apart(mine: Tensor, theirs: Tensor, ids: Tensor, dtype: str) -> float:
    """How far logits ``[batch, n, vocabulary]`` lie apart, in the unit of the precision."""
    if not bool(torch.isfinite(mine).all() and torch.isfinite(theirs).all()):
        return float("inf")
    if TOLERANCES[dtype][1] == "logits":
        return float((mine - theirs).abs().max())
    nll = [-t[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]) for t in (mine, theirs)]
    return float((nll[0] - nll[1]).abs().mean())


def judge(found: Found, worst: float, dtype: str, at: str) -> None:
    """Write down the greatest difference, and whether it is too much."""
    most, unit = TOLERANCES[dtype]
    found.add("apart", worst, unit)
    if not worst <= most:
        found.is_right, found.says = False, f"more than {most:g} {unit} apart ({at})"


def ways_of(name: str, ratios: tuple[str, ...]) -> Iterator[tuple[str, Method]]:
    """The method in every way that it is tried in, and what each is called."""
    ratios = ("0.8",) if name in IN_CHUNKS else ratios
    for options in WAYS.get(name, ({},)):
        for ratio in ratios if make_method(name, Fraction(0), options).uses_ratio(in_chunks=False) else ("0",):
            label = ", ".join([ratio, *(f"{key}={value}" for key, value in options.items())])
            yield label, make_method(name, Fraction(ratio), options)


def layout_cell(shop: Workshop, dtype: str, name: str, found: Found) -> None:
    """A layout in every way and chunk: logits, entries held, bytes."""
    model, ids = shop.small_model(dtype), shop.ids(shop.scale.text)
    worst, at = 0.0, ""
    for label, method in ways_of(name, shop.scale.ratios):
        assert isinstance(method, LayoutMethod)
        layout = make_layout(method, ids.shape[1], 0, 5)
        adapter = small_adapter(model, method) if method.adapter_kinds else None
        reader = Reader(model, adapter)
        with torch.inference_mode(), reader.ready():
            masked = reader.one_pass(ids, layout)
            for chunk in shop.scale.chunks:
                kind = MemorySession if layout.written else LayoutSession
                session = kind(reader, layout, layout.n_raw, chunk)
                streamed, cache = torch.cat([part.logits for part in session.prefill(ids)], 1), session.cache
                worst, at = max((worst, at), (apart(streamed, masked, ids, dtype), f"{label}, chunks of {chunk}"))
                if cache.entries() != len(layout.held_after(len(layout))):
                    found.is_right, found.says = False, f"{cache.entries()} entries are held ({label})"
                if cache.logical_bytes() != cache.physical_bytes():
                    found.is_right, found.says = False, f"bytes were not freed ({label})"
    judge(found, worst, dtype, at)


def policy_cell(shop: Workshop, dtype: str, name: str, found: Found) -> None:
    """A policy: against a mask of what it kept, or against transformers' own cache, where entries are changed."""
    worst, at = 0.0, ""
    for step in shop.scale.steps:
        options = {**SHORT, "step": step, **({"positions": "absolute"} if name in KEEPS_POSITIONS else {})}
        method = make_method(name, Fraction("0.3" if name == "think" else "0.6"), options)
        assert isinstance(method, CachePolicy)
        against = _transformers if name in CHANGING else _masked
        difference, cache = against(shop.small_model(dtype), method, shop.ids(shop.scale.text), dtype)
        worst, at = max((worst, at), (difference, f"step {step}"))
        over = cache.physical_bytes() / cache.logical_bytes()
        found.add("physical", over, "x logical bytes")
        if not 1 <= over <= 1.05:
            found.is_right, found.says = False, f"bytes were not freed (step {step})"
    judge(found, worst, dtype, at)


def _masked(model: Any, policy: CachePolicy, ids: Tensor, dtype: str) -> tuple[float, Any]:
    with torch.inference_mode():
        both = removed_and_masked(model, policy, ids)
    return apart(both.removed, both.masked, ids, dtype), both.cache


def _transformers(model: nn.Module, policy: CachePolicy, ids: Tensor, dtype: str) -> tuple[float, Any]:
    """Every run of tokens also by the model itself, with a cache of its own kind that holds the same entries."""
    from transformers import DynamicCache

    run = PolicySession(model, policy, ids.shape[1], (3, 5))
    mine, theirs, stop = [], [], 0
    with torch.inference_mode():
        while stop < ids.shape[1]:
            start, stop = stop, min(ids.shape[1], stop + policy.run_length(stop))
            cache = DynamicCache()
            for place, layer in enumerate(run.cache.layers):
                cache.update(*(tensor.clone() for tensor in layer.present()), place)
            held = run.cache.most_entries()
            mask = torch.ones(stop - start, held + stop - start, dtype=torch.bool, device=ids.device).tril(held)
            with policy.patched(model):
                theirs.append(model(
                    input_ids=ids[:, start:stop], past_key_values=cache, attention_mask=mask[None, None],
                    position_ids=torch.arange(start, stop, device=ids.device)[None],
                ).logits)
            mine.append(run.feed(ids[:, start:stop]))
            run.remove()
    return apart(torch.cat(mine, 1), torch.cat(theirs, 1), ids, dtype), run.cache
