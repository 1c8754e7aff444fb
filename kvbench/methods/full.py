"""The uncompressed cache, and its opposite: no context beyond the current chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvbench.methods.base import Method
from kvbench.methods.layout import Layout, Tokens, everything, plain_tokens

NONE_CHUNK = 32
"""Tokens in a chunk of the ``none`` control; part of its signature."""


@dataclass(frozen=True)
class Full(Method):
    """Every entry is held: the baseline of every comparison."""

    name = "full"
    summary = "the whole cache, nothing removed"
    takes_ratio = False

    def layout(self, n: int, rng: np.random.Generator) -> Layout:
        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, everything, n)


@dataclass(frozen=True)
class NoContext(Method):
    """Only the current disjoint chunk of 32 tokens is seen: the floor that recovery is taken from."""

    name = "none"
    summary = f"no context beyond the current disjoint chunk of {NONE_CHUNK} tokens"
    takes_ratio = False

    def layout(self, n: int, rng: np.random.Generator) -> Layout:
        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, _same_chunk, n)


def _same_chunk(queries: Tokens, keys: Tokens) -> Tensor:
    return queries.raw // NONE_CHUNK == keys.raw // NONE_CHUNK


@dataclass(frozen=True)
class Adapted(Full):
    """The tuned model with nothing removed: what an ungated adapter changes by itself.

    Tuning alone lowers in-domain perplexity, so a method with a plain adapter is always shown
    beside this control. A gated adapter needs none: without sentinels it is the base model.
    """

    name = "adapted"
    summary = "a plain adapter's model with the whole cache: the effect of tuning alone"
    needs_adapter = True
    trainable = ("plain", "full")
