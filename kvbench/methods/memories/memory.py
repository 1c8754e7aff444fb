"""The base class of memories that are computed from text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
from torch import nn

from kvbench.methods.layouts.chunked import equal_chunks
from kvbench.methods.layouts.chunks import SHORTEST, check_chunk, chunk_length
from kvbench.methods.layouts.layout import RUNNING, Layout, TextStructure
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.memories.layout import PLACES, chunk_bounds, chunks_of, memory_layout, sampled_chunks
from kvbench.methods.memories.writer import Writer
from kvbench.methods.options import option


@dataclass(frozen=True)
class Memory(LayoutMethod):
    """A layout in which a writer turns every chunk into ``n_comp`` input rows, which the model reads in its place.

    Running text is cut into chunks of ``round(n_comp / (1 - ratio))`` tokens, as for ``ccm-concat``; dialogues into
    their turns. While text is scored that it has read, the model reads a chunk given the memory of those before it; at
    the end of the chunk its entries leave, the writer writes, and the rows are fed. Where text is read for what follows
    it (prefixes, prompts), closed chunks need not be read by the model at all: with ``unread=true`` only their memory
    is fed, which is where these methods save time. The last token before what follows stays as it is in both cases, so
    that the next one is predicted from text.

    Attributes:
        low_rank: whether the writer reads with the model, to which low-rank pairs are then added.
        is_latest: whether a chunk's memory stands for all text before it, and replaces earlier memory.
    """

    position_rule = "shared"
    adapter_kinds: ClassVar[tuple[str, ...]] = ("writer",)
    low_rank: ClassVar[bool] = False
    is_latest: ClassVar[bool] = False
    shortest_trained: ClassVar[int] = SHORTEST

    n_comp: int = option(8, "entries that are made of a chunk", least=1, most=128, trained=True)
    place: str = option(
        "spread", "positions of the entries: over those of the chunk, all at its end, or counted from 0 with the text "
        "behind them", choices=PLACES, trained=True,
    )
    unread: bool = option(True, "chunks of a prefix are not read by the model, only their memory is")

    @abstractmethod
    def new_writer(self, model: nn.Module) -> Writer:
        """A writer for the model, with fresh parameters.

        Raises:
            UserError: the model is not one that it can write for.
        """

    def uses_ratio(self, in_chunks: bool) -> bool:
        return "ratio" in self.budgets and not in_chunks

    @property
    def feeds_rows(self) -> bool:
        return True

    def chunk(self) -> int:
        """Chunk length of running text, in tokens."""
        return chunk_length(self, self.n_comp)

    def check(self, longest: int, in_chunks: bool) -> None:
        if not in_chunks:
            check_chunk(self, self.chunk(), longest)

    def positions_read(self, chunks: Sequence[int]) -> int:
        """Number of position ids that the model needs when the memory of these chunks is written; each is read from
        position 0 on."""
        return max(chunks, default=0)

    def positions_trained(self, length: int) -> int:
        low, high = chunk_bounds(length, self.n_comp, self.shortest_trained)
        return max(length, *(
            self.positions_read(equal_chunks(length, chunk, self.n_comp)) for chunk in range(low, high + 1)
        ))

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        chunks = chunks_of(n, self.chunk(), self.n_comp, text)
        read = text.prefix or n
        may_skip = self.unread and text.is_continued and sum(chunks.lengths[: chunks.closed]) < read
        return self.layout_of(n, chunks.lengths, chunks.closed if may_skip else 0)

    def layout_of(self, n: int, chunks: list[int], unread: int = 0) -> Layout:
        """The layout with these chunks, the text of the first ``unread`` of which is not read."""
        return memory_layout(n, chunks, self.n_comp, is_latest=self.is_latest, place=self.place, unread=unread)

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        """Chunks of one length, sampled log-uniformly; sometimes the end of the text stays uncompressed."""
        method = cls.from_options(Fraction(0), options)
        return method.layout_of(n, sampled_chunks(n, method.n_comp, cls.shortest_trained, rng))
