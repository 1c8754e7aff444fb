"""Random columns of the attention mask, the second baseline of the Sentinel paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbench.methods.budget import kept
from kvbench.methods.layouts.layout import RUNNING, Layout, TextStructure, Tokens, plain_tokens
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.options import option

_DROPPED, _KEPT = 0, 1


@dataclass(frozen=True)
class Scattered(LayoutMethod):
    """Keeps kept(N, r) random columns of the block (or the prefix), without replacement; tokens always see themselves.

    The published code samples each column independently with probability 1 - r, so that the number kept is random:
    ``--set sampler=published``.
    """

    name = "scattered"
    summary = "kept(N, r) random columns of the block"
    paper = "arXiv 2310.08152 (baseline)"
    seeded = True

    sampler: str = option(
        "exact", "how columns are drawn: exactly as many as are kept, or each by itself", choices=("exact", "published")
    )

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        segment = torch.full((n,), _DROPPED)
        if self.sampler == "published":
            columns = np.flatnonzero(rng.random(n) >= float(self.ratio))
        else:
            prefix = text.prefix or n
            columns = rng.choice(prefix, kept(prefix, self.ratio), replace=False)
            if prefix < n:
                written = rng.choice(n - prefix, max(0, kept(n, self.ratio) - len(columns)), replace=False)
                columns = np.concatenate([columns, prefix + written])
        segment[torch.from_numpy(columns)] = _KEPT
        tokens = plain_tokens(n, segment)
        return Layout(tokens, tokens.raw, _kept_column, n)


@dataclass(frozen=True)
class ScatteredTuned(Scattered):
    """``scattered`` with a LoRA trained under such masks, as in the paper's code."""

    name = "scattered-tuned"
    summary = "the same, with a LoRA trained under such masks"
    adapter_kinds = ("plain", "full")


def _kept_column(queries: Tokens, keys: Tokens) -> Tensor:
    return (keys.segment == _KEPT) & (queries.slot >= 0)
