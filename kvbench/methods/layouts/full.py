"""The uncompressed cache, and its opposite: no context beyond the current chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbench.methods.base import Effect
from kvbench.methods.layouts.layout import RUNNING, Layout, TextStructure, Tokens, everything, plain_tokens
from kvbench.methods.layouts.method import LayoutMethod

NONE_CHUNK = 32
"""Tokens in a chunk of the ``none`` control; part of its signature."""


@dataclass(frozen=True)
class Full(LayoutMethod):
    """Every entry is held: the baseline of every comparison."""

    name = "full"
    summary = "the whole cache, nothing removed"
    budgets = ()
    effect = Effect.NONE

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, everything, n)


@dataclass(frozen=True)
class NoContext(LayoutMethod):
    """Only the current disjoint chunk of 32 tokens is seen: the floor that recovery is taken from.

    Where the text itself comes in chunks, such as turns, only the current one is seen.
    """

    name = "none"
    summary = f"no context beyond the current disjoint chunk of {NONE_CHUNK} tokens"
    budgets = ()
    effect = Effect.NONE

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        if text.chunks:
            unit = torch.repeat_interleave(torch.arange(len(text.chunks)), torch.tensor(text.chunks))
            tokens = plain_tokens(n, unit)
            return Layout(tokens, tokens.raw, _same_unit, n, next_unit=len(text.chunks))
        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, _same_chunk, n)


def _same_chunk(queries: Tokens, keys: Tokens) -> Tensor:
    return queries.raw // NONE_CHUNK == keys.raw // NONE_CHUNK


def _same_unit(queries: Tokens, keys: Tokens) -> Tensor:
    return queries.unit == keys.unit


@dataclass(frozen=True)
class Adapted(Full):
    """The tuned model with nothing removed: what an ungated adapter changes by itself.

    Tuning alone lowers in-domain perplexity, so a method with a plain adapter is always shown
    beside this control. A gated adapter needs none: without sentinels it is the base model.
    """

    name = "adapted"
    summary = "a plain adapter's model with the whole cache: the effect of tuning alone"
    adapter_kinds = ("plain", "full")
