"""Writers: what turns a chunk of text into the rows that its memory is fed from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kvbench.models.embeddings import spread_of

State: TypeAlias = tuple[Tensor, ...]
"""What a writer carries from chunk to chunk, each ``[batch, ...]``; it counts as held."""

AT_ONCE = 4096
"""Tokens, of all rows together, that a writer reads in one forward pass of the model."""


class Writer(nn.Module, ABC):
    """Writes the memory of one chunk after another.

    A writer has the parameters that an adapter of its method trains, besides low-rank pairs in the model.
    """

    def begin(self, batch: int) -> State:
        """The state before any text."""
        return ()

    @abstractmethod
    def write(self, model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Write the memory of one chunk.

        Args:
            model: the model that reads the memory; low-rank pairs act on all that it is fed here.
            ids: int64 ``[batch, c]``, the text of the chunk.
            state: what the chunks before have left.

        Returns:
            Input embeddings ``[batch, k, width]``, and the new state.
        """

    def write_all(
        self, model: nn.Module, ids: Tensor, chunks: Sequence[int], state: State
    ) -> tuple[Tensor, State]:
        """Write the memory of consecutive chunks; by default one after another.

        Args:
            ids: int64 ``[batch, n]``, text that begins with the first of them.
            chunks: their lengths, at least one.

        Returns:
            Input embeddings ``[batch, k x chunks, width]``, and the new state.
        """
        found, begin = [], 0
        for number, length in enumerate(chunks):
            state = self.carried(number, state)
            rows, state = self.write(model, ids[:, begin : begin + length], state)
            found.append(rows)
            begin += length
        return torch.cat(found, 1), state


    def carried(self, number: int, state: State) -> State:
        """The state with which the chunk of that number is written in :meth:`write_all`."""
        return state


class ParallelWriter(Writer):
    """A writer that needs nothing but the text of a chunk, so that chunks of one length are written together."""

    @abstractmethod
    def read(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Input embeddings ``[chunks, k, width]`` of the memory of chunks ``[chunks, c]``."""

    def write(self, model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
        return self.read(model, ids), state

    def write_all(
        self, model: nn.Module, ids: Tensor, chunks: Sequence[int], state: State
    ) -> tuple[Tensor, State]:
        found: list[Tensor] = []
        for length, count in _runs(chunks):
            begin = sum(chunks[: len(found)])
            run = ids[:, begin : begin + length * count].reshape(-1, length)
            rows = torch.cat([self.read(model, part) for part in torch.split(run, max(1, AT_ONCE // length))])
            found += rows.view(len(ids), count, *rows.shape[1:]).unbind(1)
        return torch.cat(found, 1), state


def _runs(chunks: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive chunks of one length: the length, and how many they are."""
    found: list[tuple[int, int]] = []
    for length in chunks:
        if found and found[-1][0] == length:
            found[-1] = (length, found[-1][1] + 1)
        else:
            found.append((length, 1))
    return found


def embedded(model: nn.Module, ids: Tensor) -> Tensor:
    """Input embeddings ``[batch, n, width]`` of text."""
    found: Tensor = model.get_input_embeddings()(ids)  # type: ignore[operator]
    return found


def last_states(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's last hidden states ``[batch, n, width]`` on embeddings of that shape, read from position 0 on."""
    out: Any = _decoder(model)(inputs_embeds=inputs, use_cache=False)
    states: Tensor = out.last_hidden_state
    return states


def all_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states ``[layers + 1, batch, n, width]`` of text, the embeddings first."""
    out: Any = _decoder(model)(input_ids=ids, use_cache=False, output_hidden_states=True)
    return torch.stack(list(out.hidden_states))


def _decoder(model: Any) -> Any:
    """The part of a model that gives hidden states; ``base_model`` is the whole of some."""
    return model.get_decoder()


class Projection(nn.Module):
    """Turns hidden states into rows that look like input embeddings: a layer norm, a square matrix, started at the
    identity, and a scale, started at the spread of the embeddings.

    Hidden states are several times wider than embeddings, and rows must be what the model is used to read.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        spread = spread_of(model)
        width = len(spread.mean)
        self.norm = nn.LayerNorm(width)
        self.square = nn.Linear(width, width)
        self.scale = nn.Parameter(spread.overall)
        with torch.no_grad():
            self.square.weight.copy_(torch.eye(width))
            self.square.bias.zero_()

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.scale * self.square(self.norm(states))
        return found


def learnt_rows(model: nn.Module, count: int) -> nn.Parameter:
    """Rows ``[count, width]`` to be trained, drawn near the mean embedding."""
    spread = spread_of(model)
    return nn.Parameter(spread.mean + 0.5 * spread.by_column * torch.randn(count, len(spread.mean)))
