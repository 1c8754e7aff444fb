"""In-context autoencoder (Ge et al., ICLR 2024, arXiv 2307.06945)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvbench.methods.memories.memory import Memory
from kvbench.methods.memories.writer import ParallelWriter, Projection, embedded, last_states, learnt_rows
from kvbench.methods.options import option


class SlotWriter(ParallelWriter):
    """The model's last hidden states at ``k`` learnt tokens behind the chunk.

    Args:
        is_raw: whether the states are rows as they are; otherwise they are projected.
    """

    def __init__(self, model: nn.Module, k: int, is_raw: bool) -> None:
        super().__init__()
        self.slots = learnt_rows(model, k)
        self.projection = nn.Identity() if is_raw else Projection(model)

    def read(self, model: nn.Module, ids: Tensor) -> Tensor:
        return self.read_behind(model, embedded(model, ids))

    def read_behind(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Rows ``[batch, k, width]`` at the learnt tokens behind inputs ``[batch, n, width]``."""
        slots = self.slots.to(inputs.dtype).expand(len(inputs), -1, -1)
        states = last_states(model, torch.cat([inputs, slots], 1))[:, -self.slots.shape[0] :]
        rows: Tensor = self.projection(states)
        return rows


@dataclass(frozen=True)
class ICAE(Memory):
    """Replaces each chunk by ``n_comp`` rows that the model itself, with low-rank pairs, has made of it.

    The encoder is the model with LoRA on its attention projections; it reads the chunk and ``n_comp`` learnt tokens
    behind it, from position 0 on, and its last hidden states at these are the memory. The decoder is the model as it
    is, without LoRA.

    Departures from the released code: rows are projected (a layer norm, a matrix started at the identity, and the
    embeddings' spread) unless ``raw=true``, which is as published; rows stand at places of their chunk
    (``place=spread``) and text keeps its own, where the paper counts rows from 0 (``place=own``); the loss is on all
    text, whose chunks are read given the memory of those before, and there are no separate tokens for
    auto-encoding and for language modelling.
    """

    name = "icae"
    summary = "rows made of each chunk by the model itself with LoRA, read by the model without"
    paper = "arXiv 2307.06945"
    low_rank = True

    raw: bool = option(False, "hidden states are rows as they are, as published", trained=True)

    def positions_read(self, chunks: Sequence[int]) -> int:
        return max(chunks, default=0) + self.n_comp

    def new_writer(self, model: nn.Module) -> SlotWriter:
        return SlotWriter(model, self.n_comp, self.raw)
