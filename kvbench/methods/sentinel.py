"""The Sentinel compressor (Ren, Jia and Zhu, EMNLP 2023, arXiv 2310.08152)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.base import Method
from kvbench.methods.layout import CLOSE, OPEN, OUTSIDE, RAW, Layout, Tokens

MAX_SPAN = 25
MEAN_REMOVED = Fraction(25, 2)
"""Entries that a span removes on average (its length less its one summary)."""


@dataclass(frozen=True)
class Sentinel(Method):
    """Spans of text between an opening and a closing sentinel, of which one entry remains.

    The closing sentinel sees its own span and the opening sentinel only, so that its keys and
    values become the summary of the span; every later token may see the closing sentinel and
    never the span. Sentinels repeat the position of the token before them.

    Departures from the released code: sentinel ids are inserted after tokenisation (no stray
    spaces), spans are drawn so that the realised ratio is the asked one to 1/n (the released
    sampler saturates near one half), and the same text tokens are scored for every method. As
    published, the token after a span is predicted by the last token of the span.
    """

    name = "sentinel"
    summary = "one trained summary entry per closed span of 2 to 25 tokens"
    paper = "arXiv 2310.08152"
    needs_adapter = True
    trainable = ("gated", "plain", "full")
    seeded = True
    position_rule = "shared"

    @property
    def n_rows(self) -> int:
        return 2

    def layout(self, n: int, rng: np.random.Generator) -> Layout:
        gaps, lengths = sample_spans(n, self.ratio, rng)
        return span_layout(gaps, lengths)


def sample_spans(
    n: int, ratio: Fraction, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Draw spans that remove exactly floor(ratio * n) of ``n`` entries.

    Returns:
        The K + 1 gaps of uncompressed tokens around the spans, and the K span lengths
        (2 to 25 tokens each); together they cover the n tokens.

    Raises:
        UserError: no set of spans of at most 25 tokens removes that many entries.
    """
    removed = (ratio.numerator * n) // ratio.denominator
    fewest = math.ceil(removed / (MAX_SPAN - 1))
    most = min(n - removed, removed)
    if fewest > most:
        raise UserError(
            f"sentinel cannot remove {float(ratio):g} of {n} tokens: each span of up to "
            f"{MAX_SPAN} tokens keeps one entry.",
            "Ask for a ratio of at most 0.96.",
        )
    if removed == 0:
        return [n], []
    count = min(max(round(removed / MEAN_REMOVED), fewest, 1), most)
    shares = _bounded_composition(removed, count, MAX_SPAN - 1, rng)
    free = n - removed - count
    bars = np.sort(rng.choice(free + count, count, replace=False))
    edges = np.concatenate(([-1], bars, [free + count]))
    return list(np.diff(edges) - 1), list(shares + 1)


def _bounded_composition(total: int, parts: int, top: int, rng: np.random.Generator) -> np.ndarray:
    """``parts`` integers in [1, top] with the given sum: uniform draws, then random unit moves."""
    draw = rng.integers(1, top, size=parts, endpoint=True)
    while (missing := total - int(draw.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = np.flatnonzero(draw < top if step > 0 else draw > 1)
        chosen = rng.permutation(movable)[: abs(missing)]
        draw[chosen] += step
    return draw


def span_layout(gaps: list[int], lengths: list[int]) -> Layout:
    """The typed sequence gap, OPEN, span, CLOSE, gap, ... of K spans and K + 1 gaps."""
    runs: list[tuple[int, int, int]] = []  # (kind, unit, how many)
    for unit, length in enumerate(lengths):
        runs += [(RAW, OUTSIDE, gaps[unit]), (OPEN, unit, 1), (RAW, unit, length), (CLOSE, unit, 1)]
    runs.append((RAW, OUTSIDE, gaps[-1]))
    counts = torch.tensor([run[2] for run in runs])
    kind = torch.repeat_interleave(torch.tensor([run[0] for run in runs]), counts)
    units = torch.repeat_interleave(torch.tensor([run[1] for run in runs]), counts)
    raw = torch.clamp(torch.cumsum(kind == RAW, 0) - 1, min=0)
    tokens = Tokens(torch.arange(len(kind)), kind, raw, units)
    return Layout(tokens, raw, sentinel_policy, int((kind == RAW).sum()))


def sentinel_policy(queries: Tokens, keys: Tokens) -> Tensor:
    """Who sees whom: see the class docstring of :class:`Sentinel`."""
    own_span = (keys.unit == queries.unit) & (keys.unit != OUTSIDE)
    summary_or_free = (keys.kind == CLOSE) | (keys.unit == OUTSIDE)
    text_sees = summary_or_free | (own_span & (keys.kind == RAW))
    return ((queries.kind == RAW) & text_sees) | ((queries.kind == CLOSE) & own_span)
