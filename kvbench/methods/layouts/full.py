"""The uncompressed cache, and the opposite control: no context beyond the current chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbench.methods.base import Effect
from kvbench.methods.layouts.layout import RUNNING, Layout, TextStructure, Tokens, plain_tokens, sees_everything
from kvbench.methods.layouts.method import LayoutMethod

NONE_CHUNK = 32
"""Chunk length of the ``none`` control in tokens; part of its signature."""


@dataclass(frozen=True)
class Full(LayoutMethod):
    """Keeps every entry: the baseline of every comparison."""

    name = "full"
    summary = "the whole cache, nothing removed"
    budgets = ()
    effect = Effect.NONE

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, sees_everything, n)


@dataclass(frozen=True)
class NoContext(LayoutMethod):
    """Each token sees only its own disjoint chunk of 32 tokens: the lower reference point of the metric ``recovery``.

    If the text comes in chunks of its own, such as turns, these take the place of the chunks of 32 tokens.
    """

    name = "none"
    summary = f"no context beyond the current disjoint chunk of {NONE_CHUNK} tokens"
    budgets = ()
    effect = Effect.NONE

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        if text.chunks:
            segment = torch.repeat_interleave(torch.arange(len(text.chunks)), torch.tensor(text.chunks))
            tokens = plain_tokens(n, segment)
            return Layout(tokens, tokens.raw, _same_unit, n, next_segment=len(text.chunks))
        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, _same_chunk, n)


def _same_chunk(queries: Tokens, keys: Tokens) -> Tensor:
    return queries.raw // NONE_CHUNK == keys.raw // NONE_CHUNK


def _same_unit(queries: Tokens, keys: Tokens) -> Tensor:
    return queries.segment == keys.segment


@dataclass(frozen=True)
class Adapted(Full):
    """The fine-tuned model with the full cache: the effect of a plain adapter by itself.

    Fine-tuning alone lowers in-domain perplexity, so a method with a plain adapter is always shown beside this control.
    A gated adapter needs none: without special tokens it is the base model.
    """

    name = "adapted"
    summary = "a plain adapter's model with the whole cache: the effect of tuning alone"
    adapter_kinds = ("plain", "full")
