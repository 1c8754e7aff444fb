"""Methods that keep recent entries: a constant window, a proportional one, and sinks with a window."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kvbench.methods.budget import kept
from kvbench.methods.layouts.ccm_budget import StreamingBudget, budget_layout
from kvbench.methods.layouts.layout import RUNNING, Layout, TextStructure, Tokens, plain_tokens
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.options import option

SINKS = 4
"""Number of first entries that ``sinks`` always keeps."""


def _fixed_at(n: int, text: TextStructure, ratio: Fraction) -> int:
    """Tokens after which a window stops growing: the prefix, if there is one and the ratio is above 0; else ``n``."""
    return text.prefix if text.prefix and ratio else n


@dataclass(frozen=True)
class Window(LayoutMethod):
    """Keeps the last kept(N, r) entries, a constant number over the block (or the prefix) of N tokens.

    Early in a block it sees more than a proportional window does; ``ratio_mean`` shows this.
    """

    name = "window"
    summary = "the last kept(N, r) entries, constant over the block"

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        size = kept(_fixed_at(n, text, self.ratio), self.ratio)

        def recent(queries: Tokens, keys: Tokens) -> Tensor:
            return keys.raw >= queries.raw - size

        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, recent, n)


@dataclass(frozen=True)
class Local(LayoutMethod):
    """Keeps the last kept(n, r) of the n entries read so far: a window that grows with the text.

    This is the local-attention baseline of the Sentinel paper's code: query i sees the keys from floor(i * r) on.
    """

    name = "local"
    summary = "the last kept(n, r) of n entries: the proportional window of the Sentinel paper"
    paper = "arXiv 2310.08152 (baseline)"

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        num, den = self.ratio.numerator, self.ratio.denominator

        def proportional(queries: Tokens, keys: Tokens) -> Tensor:
            return keys.raw >= (queries.raw * num) // den

        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, proportional, n)


@dataclass(frozen=True)
class Sinks(StreamingBudget):
    """Keeps the first 4 entries and a recent window, max(5, kept(n, r)) entries together after every n tokens.

    After StreamingLLM (arXiv 2309.17453), with two departures: the window grows with the text, so that it holds as many
    entries as the methods it is compared with, and kept keys keep their absolute positions. During generation the
    window keeps its size at the end of the prefix. With ``budget=160`` entries are dropped at the same steps, and down
    to the same number, as by ``ccm-concat`` under that budget.
    """

    name = "sinks"
    summary = "the 4 first entries and a recent window, max(5, kept(n, r)) together"
    paper = "after arXiv 2309.17453"

    n_comp: int = option(2, "entries of memory that ccm-concat would make, under --set budget=", least=1, most=32)

    def uses_ratio(self, in_chunks: bool) -> bool:
        return not self.streams

    @property
    def minimum(self) -> int:
        return SINKS + 1

    @property
    def resolved(self) -> dict[str, str]:
        return super().resolved if self.streams else {}

    def check(self, longest: int, in_chunks: bool) -> None:
        self.check_budget(self.n_comp, in_chunks)

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        if self.streams:
            return budget_layout(self, n, self.n_comp, None, with_memory=False)
        num, den = self.ratio.numerator, self.ratio.denominator
        most = _fixed_at(n, text, self.ratio)

        def sinks_and_recent(queries: Tokens, keys: Tokens) -> Tensor:
            read = queries.raw.clamp(max=most)
            held = read - (read * num) // den
            recent = torch.clamp(held, min=SINKS + 1) - SINKS
            return (keys.raw < SINKS) | (keys.raw >= queries.raw - recent)

        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, sinks_and_recent, n)


@dataclass(frozen=True)
class LocalTuned(Local):
    """``local`` with a LoRA trained under such windows, as in the paper's code."""

    name = "local-tuned"
    summary = "the same, with a LoRA trained under such windows"
    adapter_kinds = ("plain", "full")


@dataclass(frozen=True)
class SinksTuned(Sinks):
    """``sinks`` with a LoRA trained under the same sinks and window."""

    name = "sinks-tuned"
    summary = "the same, with a LoRA trained under such windows"
    adapter_kinds = ("plain", "full")
