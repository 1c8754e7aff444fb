"""Base class of methods that compress text chunk by chunk.

The text comes in chunks (turns of a dialogue, or runs of equal length). After a chunk has been read, it is compressed
into a few memory entries and leaves the cache. The methods differ in which tokens attend to the memory meanwhile, and
in whether memories are concatenated or merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from kvbench.errors import UserError
from kvbench.methods.budget import ratio_text
from kvbench.methods.layouts.chunked import ChunkVisibility, Merge, Pool, chunk_layout, equal_chunks
from kvbench.methods.layouts.layout import COMP, RUNNING, Layout, TextStructure
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.options import option

SHORTEST, LONGEST = 8, 128
"""Bounds on the chunk length of running text, in tokens."""


def chunk_length(method: LayoutMethod, n_comp: int) -> int:
    """Chunk length at which ``n_comp`` entries per chunk meet the method's ratio: round(n_comp / (1 - r)) tokens.

    Raises:
        UserError: it is outside 8 to 128.
    """
    chunk = math.floor(Fraction(n_comp) / (1 - method.ratio) + Fraction(1, 2))
    if not SHORTEST <= chunk <= LONGEST:
        low, high = (float(1 - Fraction(n_comp, c)) for c in (SHORTEST, LONGEST))
        reach = f"between {max(low, 0):.3g} and {high:.3g}" if low < high else f"below {high:.3g}"
        raise UserError(
            f"{method.name} at ratio {ratio_text(method.ratio)} with n_comp={n_comp} needs chunks of {chunk} "
            f"tokens, and they have {SHORTEST} to {LONGEST}.",
            f"Ask for a ratio {reach}, or another --set n_comp=.",
        )
    return chunk


def check_chunk(method: LayoutMethod, chunk: int, longest: int) -> None:
    """Check that a chunk fits a text of up to ``longest`` tokens.

    Raises:
        UserError: it does not.
    """
    if chunk > longest:
        raise UserError(
            f"{method.name}: a chunk of {chunk} tokens does not fit in {longest} tokens of text.",
            "Ask for a lower ratio or a shorter chunk, or use longer blocks.",
        )


@dataclass(frozen=True)
class Chunked(LayoutMethod):
    """Base of methods that compress chunk by chunk: the ratio sets the chunk length, options set the rest."""

    position_rule = "shared"

    n_comp: int = option(2, "entries that are made of a chunk", least=1, most=32, trained=True)

    def uses_ratio(self, in_chunks: bool) -> bool:
        return "ratio" in self.budgets and not in_chunks

    @property
    def n_rows(self) -> int:
        return self.n_comp if self.adapter_kinds else 0

    @property
    def extra_positions(self) -> int:
        return self.n_rows

    def chunk(self) -> int:
        """Chunk length of running text, in tokens."""
        return chunk_length(self, self.n_comp)

    def check(self, longest: int, in_chunks: bool) -> None:
        if not in_chunks:
            check_chunk(self, self.chunk(), longest)

    @property
    def compresses_generated(self) -> bool:
        """Whether generated text is compressed too, which requires that text within chunks sees the memory."""
        return self.visibility(1).text

    def visibility(self, chunks: int) -> ChunkVisibility:
        return ChunkVisibility(chunks, text=True, memory=True, latest=False, kind=COMP)

    def merge_rule(self) -> Merge | Pool | None:
        return None

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        chunks = list(text.chunks) or equal_chunks(text.prefix or n, self.chunk(), self.n_comp)
        if text.prefix and self.compresses_generated:
            chunks += equal_chunks(n - sum(chunks), self.chunk(), self.n_comp)
        return chunk_layout(n, chunks, self.n_comp, self.visibility(len(chunks)), self.merge_rule())

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        """Chunks of one length, sampled log-uniformly; sometimes the end of the text stays uncompressed."""
        method = cls.from_options(Fraction(0), options)
        length = round(float(np.exp(rng.uniform(np.log(SHORTEST), np.log(min(LONGEST, n // 2))))))
        compressed = n if rng.random() < 0.75 else int(rng.integers(length, n))
        if not method.visibility(2).text:  # the memory is only seen by the text after the chunks
            compressed = int(rng.integers(n // 4, 3 * n // 4))
        chunks = equal_chunks(compressed, length, method.n_comp)
        return chunk_layout(n, chunks, method.n_comp, method.visibility(len(chunks)), method.merge_rule())
