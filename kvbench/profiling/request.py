"""What is profiled: one request of a method on a model, read and written step by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvbench.cache.evicting import EvictingCache, storage_bytes
from kvbench.cache.shape import cache_shape
from kvbench.inference.generation import Continuation, Sampling
from kvbench.inference.layout_session import Reader
from kvbench.methods import Layout
from kvbench.models.adapter import Adapter
from kvbench.models.configuration import text_config


class Request(Protocol):
    """A batch of prompts and what is written after them."""

    def read(self) -> Tensor:
        """Read the prompts: logits ``[batch, vocabulary]``."""

    def fill(self, seed: int) -> Tensor:
        """Put random entries where reading would have left some: random logits."""

    def write(self, logits: Tensor) -> Iterator[Tensor]:
        """Choose, feed, choose ...: the tokens, greedily, never ending early."""

    @property
    def entries(self) -> int:
        """Entries in the cache now, per layer and row; dead ones that wait for reuse included."""

    @property
    def held(self) -> int:
        """Of these, the ones that are alive."""

    @property
    def peak(self) -> int:
        """The most entries there ever were."""

    @property
    def live_bytes(self) -> int:
        """Bytes of what is alive."""

    def tensors(self) -> list[Tensor]:
        """All that the cache holds."""


def random_entries(
    model: nn.Module, batch: int, entries: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values ``[batch, heads, entries, width]`` of every layer: seeded, normal, of no meaning.

    All rows of the batch are alike, which changes nothing for time and saves most of the drawing.
    """
    like = next(model.parameters())
    generator = torch.Generator(like.device).manual_seed(seed)
    for heads, *widths in cache_shape(model).layers:
        keys, values = (
            torch.empty(1, heads, entries, width, dtype=like.dtype, device=like.device).normal_(generator=generator)
            .expand(batch, -1, -1, -1).clone(memory_format=torch.contiguous_format)
            for width in widths
        )
        yield keys, values


def random_logits(model: nn.Module, batch: int, seed: int) -> Tensor:
    like = next(model.parameters())
    generator = torch.Generator(like.device).manual_seed(seed)
    size = int(text_config(model.config).vocab_size)
    return torch.empty(batch, size, dtype=like.dtype, device=like.device).normal_(generator=generator)


@dataclass
class EvictingRequest:
    """A method's layout in our cache.

    Attributes:
        prompt: ids ``[batch, P]``.
        layout: of P + new tokens.
        chunk: tokens of the prompt that are fed at a time.
        beside: see :class:`kvbench.inference.layout_session.Reader`.
    """

    model: nn.Module
    adapter: Adapter | None
    prompt: Tensor
    layout: Layout
    new_tokens: int
    chunk: int
    beside: Any

    def __post_init__(self) -> None:
        greedy = torch.full((len(self.prompt), 1, self.new_tokens), torch.nan, dtype=torch.float64)
        self.text = Continuation(self.prompt, greedy, self.layout, Sampling(), chunk=self.chunk)
        self.reader = Reader(self.model, self.adapter, beside=self.beside)

    def ready(self) -> AbstractContextManager[Reader]:
        return self.reader.ready()

    def read(self) -> Tensor:
        return self.text.read(self.reader)

    def fill(self, seed: int) -> Tensor:
        cache = EvictingCache()
        for place, (keys, values) in enumerate(
            random_entries(self.model, len(self.prompt), self.text.left, seed)
        ):
            cache.update(keys, values, place)
        self.text.assume(cache)
        self.reader.trace.held = self.reader.trace.peak = self.text.left
        return random_logits(self.model, len(self.prompt), seed)

    def write(self, logits: Tensor) -> Iterator[Tensor]:
        return self.text.write(self.reader, logits)

    @property
    def entries(self) -> int:
        return self.text.cache.entries()

    @property
    def held(self) -> int:
        return self.reader.trace.held

    @property
    def peak(self) -> int:
        return self.reader.trace.peak

    @property
    def live_bytes(self) -> int:
        return self.held * self.text.cache.entry_bytes()

    def tensors(self) -> list[Tensor]:
        return self.text.cache.tensors()


@dataclass
class StockRequest:
    """The full cache as transformers keeps it: read in one pass, grown by concatenation."""

    model: nn.Module
    prompt: Tensor
    new_tokens: int

    def __post_init__(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()

    def read(self) -> Tensor:
        return self._fed(self.prompt)

    def fill(self, seed: int) -> Tensor:
        batch, length = self.prompt.shape
        for place, (keys, values) in enumerate(random_entries(self.model, batch, length, seed)):
            self.cache.update(keys, values, place)
        return random_logits(self.model, batch, seed)

    def write(self, logits: Tensor) -> Iterator[Tensor]:
        for step in range(self.new_tokens):
            ids = logits.argmax(-1)
            yield ids
            if step + 1 < self.new_tokens:
                logits = self._fed(ids[:, None])

    def _fed(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    @property
    def entries(self) -> int:
        return int(self.cache.get_seq_length())

    held = peak = entries

    @property
    def live_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [t for layer in self.cache.layers for t in (layer.keys, layer.values)]


def cache_bytes(request: Request) -> tuple[int, int]:
    """Bytes of the live entries, and of the distinct storages that hold the cache."""
    return request.live_bytes, storage_bytes(request.tensors())
