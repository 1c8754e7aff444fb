"""Memories that are made of text and of earlier memory: RMT (Bulatov et al., NeurIPS 2022, arXiv 2207.06881) and
AutoCompressors (Chevalier et al., EMNLP 2023, arXiv 2305.14788)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvbench.errors import UserError
from kvbench.methods.layouts.chunks import LONGEST, SHORTEST
from kvbench.methods.memories.icae import SlotWriter
from kvbench.methods.memories.memory import Memory
from kvbench.methods.memories.writer import State, Writer, embedded
from kvbench.methods.options import option

SEGMENTS = 2
"""Chunks through whose memories gradients flow back."""


class RecurrentWriter(Writer):
    """The model's last hidden states at ``k`` learnt tokens behind earlier memory and the chunk.

    The state is the memory that the next chunk is read behind, ``[batch, rows, width]``.

    Args:
        is_latest: whether that is the memory of the last chunk only.
    """

    def __init__(self, model: nn.Module, k: int, is_latest: bool) -> None:
        super().__init__()
        self.slots = SlotWriter(model, k, is_raw=False)
        self.is_latest = is_latest

    def begin(self, batch: int) -> State:
        return (self.slots.slots.new_zeros(batch, 0, self.slots.slots.shape[1]),)

    def write(self, model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
        (before,) = state
        text = embedded(model, ids)
        rows = self.slots.read_behind(model, torch.cat([before.to(text.dtype), text], 1))
        return rows, (rows if self.is_latest else torch.cat([before.to(rows.dtype), rows], 1),)

    def carried(self, number: int, state: State) -> State:
        """Gradients flow back through :data:`SEGMENTS` chunks."""
        return tuple(one.detach() for one in state) if number % SEGMENTS == 0 else state


@dataclass(frozen=True)
class RMT(Memory):
    """Keeps ``n_comp`` rows in all: after every segment the model makes new ones of the old ones and the segment.

    The model reads the memory, the segment and ``n_comp`` learnt tokens, and its last hidden states at these are the
    next memory (projected as in ``icae``). With ``adapter=plain`` the same LoRA acts where text is read and where
    memory is written, as in the paper, where one model does both; with ``adapter=writer`` where memory is written only.

    Departures: a segment is read twice, once as text and once for its memory, so that both executions are the same
    computation; gradients flow back through two segments; low-rank pairs instead of all weights; the recurrent memory
    starts empty.
    """

    name = "rmt"
    summary = "a few rows in all, made anew of themselves and every segment by the model"
    paper = "arXiv 2207.06881"
    budgets = ()
    adapter_kinds = ("plain", "writer")
    low_rank = True
    is_latest = True
    shortest_trained = 32

    segment: int = option(64, "tokens of a chunk of running text", least=SHORTEST, most=LONGEST)

    def chunk(self) -> int:
        return self.segment

    def check(self, longest: int, in_chunks: bool) -> None:
        check_segment(self.name, self.n_comp, self.segment, in_chunks)
        super().check(longest, in_chunks)

    def positions_read(self, chunks: Sequence[int]) -> int:
        return max(chunks, default=0) + 2 * self.n_comp

    def new_writer(self, model: nn.Module) -> RecurrentWriter:
        return RecurrentWriter(model, self.n_comp, is_latest=True)


@dataclass(frozen=True)
class AutoCompressors(Memory):
    """Replaces each chunk by ``n_comp`` rows that the model has made of it and of all rows before.

    The model reads all earlier rows, the chunk and ``n_comp`` learnt tokens, and its last hidden states at these are
    the chunk's memory (projected as in ``icae``); memories accumulate. LoRA and departures as for ``rmt``.
    """

    name = "autocompressors"
    summary = "rows made of each chunk and of all earlier rows by the model, side by side"
    paper = "arXiv 2305.14788"
    budgets = ("ratio", "tokens")  # the state is not in a budget of bytes
    adapter_kinds = ("plain", "writer")
    low_rank = True
    shortest_trained = 32

    def positions_read(self, chunks: Sequence[int]) -> int:
        return max((number * self.n_comp + chunk for number, chunk in enumerate(chunks, 1)), default=0)

    def new_writer(self, model: nn.Module) -> RecurrentWriter:
        return RecurrentWriter(model, self.n_comp, is_latest=False)


def check_segment(name: str, n_comp: int, segment: int, in_chunks: bool) -> None:
    """Check that a segment has more tokens than its memory has entries.

    Raises:
        UserError: it has not.
    """
    if not in_chunks and n_comp >= segment:
        raise UserError(
            f"{name}: {n_comp} entries for a chunk of {segment} tokens compress nothing.",
            "Give a smaller --set n_comp= or a longer --set segment=.",
        )
