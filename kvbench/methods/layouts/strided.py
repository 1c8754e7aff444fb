"""A window and evenly spaced tokens: SCOUT's checkpoints (arXiv 2509.00935) on a model that exists."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.budget import kept, ratio_text
from kvbench.methods.layouts.layout import RUNNING, Layout, TextStructure, Tokens, plain_tokens
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.options import option


@dataclass(frozen=True)
class Strided(LayoutMethod):
    """Keeps a recent window and evenly spaced earlier tokens, kept(n, r) entries together after every n tokens.

    After SCOUT (arXiv 2509.00935), where every tenth token stays in the cache of a layer of its own, beside layers of
    window attention, in a model trained so from scratch. Here every layer of an ordinary model attends to both; how
    far apart the tokens are, and how long the window is, follow from the ratio: ``share`` per cent of the entries are
    the window. With ``share=100`` this is ``local``. ``sinks=s`` keeps the first s tokens in the place of as many of
    the others, as SCOUT does not.
    """

    name = "strided"
    summary = "a recent window and every s-th earlier token, kept(n, r) together"
    paper = "after arXiv 2509.00935"

    share: int = option(50, "per cent of the entries that are the last tokens", least=0, most=100)
    sinks: int = option(0, "first tokens that stay")

    @property
    def minimum(self) -> int:
        return self.sinks + 1

    def check_kept(self, n: int) -> None:
        if self.sinks and kept(n, self.ratio) < min(n, self.minimum):
            raise UserError(
                f"{self.name} at ratio {ratio_text(self.ratio)} keeps {kept(n, self.ratio)} of {n} entries, and "
                f"--set sinks={self.sinks} keeps more: the ratio would not be met.",
                "Give a smaller --ratio, or fewer sinks.",
            )

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        stays, start = self.spaced(n), self.window_start(n)

        def spaced_and_recent(queries: Tokens, keys: Tokens) -> Tensor:
            return stays[keys.raw] | (keys.raw >= start[queries.raw])

        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, spaced_and_recent, n)

    def spaced(self, n: int) -> Tensor:
        """bool ``[n]``: which tokens never leave. Of the first m they are floor(m x), x being their share of all
        tokens, or the sinks as long as these are more."""
        rate = (1 - self.ratio) * (1 - Fraction(self.share, 100))
        token = torch.arange(n)
        # At the end of every interval, as the last token of a block of SCOUT.
        before, after = ((m * rate.numerator) // rate.denominator for m in (token, token + 1))
        return (after > before.clamp(min=self.sinks)) | (token < self.sinks)

    def window_start(self, n: int) -> Tensor:
        """int64 ``[n + 1]``: the first token of the window of the query that has read so many tokens."""
        outside = torch.cat([torch.zeros(1, dtype=torch.long), torch.cumsum(self.spaced(n), 0)])
        # With a window from token b on, m tokens leave m - b + outside[b] entries, which falls by 0 or 1 as b grows.
        gained = outside - torch.arange(n + 1)
        wanted = torch.tensor([kept(m, self.ratio) - m for m in range(n + 1)])
        start = torch.searchsorted(-gained, -wanted)
        return torch.minimum(start, torch.arange(n + 1))


@dataclass(frozen=True)
class StridedTuned(Strided):
    """``strided`` with a LoRA trained under the same windows and tokens."""

    name = "strided-tuned"
    summary = "the same, with a LoRA trained under such windows"
    adapter_kinds = ("plain", "full")
