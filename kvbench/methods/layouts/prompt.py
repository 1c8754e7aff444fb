"""A learnt prompt in the place of every chunk: the control of memories that are made from text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from kvbench.errors import UserError
from kvbench.methods.layouts.ccm import Streaming
from kvbench.methods.layouts.chunked import ChunkVisibility
from kvbench.methods.layouts.chunks import SHORTEST
from kvbench.methods.layouts.layout import COMP, RUNNING, Layout, TextStructure
from kvbench.methods.memories.layout import PLACES, chunks_of, memory_layout, sampled_chunks
from kvbench.methods.options import option

AFTER = "after"
"""Places of memory behind the last token of its chunk, as the COMP tokens of CCM have them."""


@dataclass(frozen=True)
class Prompt(Streaming):
    """Replaces each chunk by ``n_comp`` trained entries that have never seen any text.

    The layout is that of ``ccm-concat``: as many entries, at the same positions, seen by the same tokens. But COMP
    tokens see each other and those of earlier chunks only, so that what a memory gains over this one is what it has
    taken from the text; the rest is what trained rows do to a model by themselves. Under ``budget=160`` the same holds
    of the streaming form. With ``place=spread`` (``end``, ``own``) the layout is that of memories computed from
    text, such as ``icae``.
    """

    name = "prompt"
    summary = "trained entries in the place of each chunk that have seen no text: the control of memories"
    adapter_kinds = ("gated", "plain", "full")

    n_comp: int = option(2, "entries that are made of a chunk", least=1, most=128, trained=True)
    place: str = option(
        AFTER, "positions of the entries: behind the chunk, or as for memories computed from text",
        choices=(AFTER, *PLACES), trained=True, later=True,
    )

    def check_options(self) -> None:
        if self.streams and self.place != AFTER:
            raise UserError(
                f"{self.name}: --set place={self.place} is for chunks of one length, and not for the streaming form.",
                "Leave out place or budget.",
            )

    def visibility(self, chunks: int) -> ChunkVisibility:
        return ChunkVisibility(chunks, text=True, memory=True, latest=False, kind=COMP, reads=False)

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        if self.place == AFTER:
            return super().layout(n, rng, text)
        return self._placed(n, chunks_of(n, self.chunk(), self.n_comp, text).lengths)

    def _placed(self, n: int, chunks: list[int]) -> Layout:
        """The layout of a memory that is computed from text, whose rows are the adapter's."""
        found = memory_layout(n, chunks, self.n_comp, is_latest=False, place=self.place)
        row = found.tokens.row
        return replace(found, tokens=found.tokens._replace(row=row.where(row < 0, row % self.n_comp)), written=())

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        method = cls.from_options(Fraction(0), options)
        if method.place == AFTER:
            return super().training_layout(n, rng, options)
        return method._placed(n, sampled_chunks(n, method.n_comp, SHORTEST, rng))
