"""What is profiled: a request of a method on a model, that is prefill and decoding of a batch of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from kvbench.cache.evicting import storage_bytes
from kvbench.inference.filling import random_entries, random_logits
from kvbench.inference.generation import generate, greedy, read_prompt
from kvbench.inference.sampling import Sampling
from kvbench.inference.session import Session


class Request(Protocol):
    """A batch of prompts and the tokens generated after them."""

    def read(self) -> Tensor:
        """Read the prompts and return logits ``[batch, vocabulary]``."""

    def fill(self, seed: int) -> Tensor:
        """Fill the cache with random entries instead of reading the prompts; returns random logits."""

    def write(self, logits: Tensor) -> Iterator[Tensor]:
        """Generate greedily and yield the ids of every step; never stops early."""

    @property
    def entries(self) -> int:
        """Number of entries in the cache now, per layer and row, including dead ones not overwritten yet."""

    @property
    def held(self) -> int:
        """Number of these entries that are alive."""

    @property
    def peak(self) -> int:
        """The most entries held at any time."""

    @property
    def live_bytes(self) -> int:
        """Bytes of the live entries."""

    def tensors(self) -> list[Tensor]:
        """All tensors that the cache holds."""


@dataclass
class SessionRequest:
    """A request that runs in the session of a method.

    Attributes:
        prompt: ids ``[batch, P]``.
    """

    session: Session
    model: nn.Module
    prompt: Tensor
    new_tokens: int

    def read(self) -> Tensor:
        return read_prompt(self.session, self.prompt)

    def fill(self, seed: int) -> Tensor:
        self.session.fill(len(self.prompt), seed)
        return random_logits(self.model, len(self.prompt), seed)

    def write(self, logits: Tensor) -> Iterator[Tensor]:
        uniforms = greedy(len(self.prompt), self.new_tokens)
        return generate(self.session, logits, uniforms, Sampling(), check=False)

    @property
    def entries(self) -> int:
        return self.session.attended

    @property
    def held(self) -> int:
        return self.session.kept

    @property
    def peak(self) -> int:
        return self.session.peak

    @property
    def live_bytes(self) -> int:
        return self.session.bytes().logical

    def tensors(self) -> list[Tensor]:
        return self.session.tensors()


@dataclass
class StockRequest:
    """A request with transformers' full cache: the prompt is read in one pass, and entries are concatenated."""

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
    """Logical bytes (of the live entries) and physical bytes (of the distinct storages) of the cache."""
    return request.live_bytes, storage_bytes(request.tensors())
