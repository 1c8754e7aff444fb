"""Gist tokens (Mu, Li and Goodman, NeurIPS 2023, arXiv 2304.08467)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from kvbench.methods.layouts.chunked import ChunkVisibility, chunk_layout
from kvbench.methods.layouts.chunks import SHORTEST, Chunked
from kvbench.methods.layouts.layout import COMP, RUNNING, Layout, TextStructure
from kvbench.methods.options import option


@dataclass(frozen=True)
class Gist(Chunked):
    """Gist tokens (arXiv 2304.08467), trained on one context at a time.

    ``mode=online`` compresses every chunk separately and concatenates all gists, which they were not trained for.
    ``mode=fixed`` reads the whole context and compresses it once at its end. Departures: the base model is frozen and
    the gist tokens have an adapter; each of the ``n_comp`` tokens has an embedding of its own, instead of one repeated.
    """

    name = "gist"
    summary = "gist tokens, trained on one context at a time, used chunk by chunk"
    paper = "arXiv 2304.08467"
    adapter_kinds = ("gated", "plain", "full")

    mode: str = option(
        "online", "gists of every chunk side by side, or of the whole context at its end", choices=("online", "fixed")
    )

    def visibility(self, chunks: int) -> ChunkVisibility:
        return ChunkVisibility(chunks, text=True, memory=False, latest=False, kind=COMP)

    def uses_ratio(self, in_chunks: bool) -> bool:
        return not in_chunks and self.mode != "fixed"

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks or self.mode == "fixed")

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        if self.mode == "fixed":
            return chunk_layout(n, [text.prefix or n], self.n_comp, self.visibility(1), None)
        return super().layout(n, rng, text)

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        method = cls.from_options(Fraction(0), options)
        length = round(float(np.exp(rng.uniform(np.log(SHORTEST), np.log(3 * n // 4)))))
        return chunk_layout(n, [length], method.n_comp, method.visibility(1), None)
