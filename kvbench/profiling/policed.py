"""What is profiled of a policy: a prompt that is compressed, and entries that go while text is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache.policy_cache import PolicedLayer
from kvbench.cache.shape import cache_shape
from kvbench.inference.generation import Sampling
from kvbench.inference.layout_session import Reader
from kvbench.inference.policy_session import PolicedContinuation, Policing
from kvbench.methods import Layout
from kvbench.methods.policies.policy import Policy
from kvbench.models.configuration import text_config
from kvbench.profiling.request import random_entries, random_logits


@dataclass
class PolicedRequest:
    """A policy in our cache.

    Attributes:
        prompt: ids ``[batch, P]``, fed at once if the policy compresses it once.
        layout: of P + new tokens, all of them text.
        beside: see :class:`kvbench.inference.policy_session.Policing`.
    """

    model: nn.Module
    policy: Policy
    prompt: Tensor
    layout: Layout
    new_tokens: int
    seed: int
    beside: Any

    def __post_init__(self) -> None:
        batch, length = self.prompt.shape
        greedy = torch.full((batch, 1, self.new_tokens), torch.nan, dtype=torch.float64)
        self.run = Policing(self.model, self.policy, length, range(batch), self.seed, beside=self.beside)
        self.text = PolicedContinuation(self.prompt, greedy, self.layout, Sampling(), chunk=length, run=self.run)
        self.reader = Reader(self.model)

    def read(self) -> Tensor:
        return self.text.read(self.reader)

    def fill(self, seed: int) -> Tensor:
        """Random entries for the whole prompt, layer by layer, of which the policy keeps its own."""
        batch, length = self.prompt.shape
        generator = torch.Generator(self.prompt.device).manual_seed(seed)
        heads = int(text_config(self.model.config).num_attention_heads)
        self.run.read, chosen = length, dict[int, Tensor]()
        self.run.cache.layers = [PolicedLayer() for _ in cache_shape(self.model).layers]
        for number, (keys, values) in enumerate(random_entries(self.model, batch, length, seed)):
            layer = self.run.cache.layers[number]
            layer.extend(keys, values, 0)
            shape = (batch, heads, max(1, self.policy.looks_at), keys.shape[-1])
            queries = torch.empty(shape, dtype=keys.dtype, device=keys.device).normal_(generator=generator)
            layer.scaling = float(keys.shape[-1]) ** -0.5
            if self.policy.looks_at:
                layer.queries = queries
            if self.policy.sums:
                layer.sums.uniform_(generator=generator)
            if self.policy.takes_moments:
                layer.moments = shape[2], queries.float().sum(2), (queries.transpose(-1, -2) @ queries).float()
            self.run.remove_from(number, chosen)
        self.run.peak = self.run.cache.most_entries()
        return random_logits(self.model, batch, seed)

    def write(self, logits: Tensor) -> Iterator[Tensor]:
        return self.text.write(self.reader, logits)

    @property
    def entries(self) -> int:
        """Those that the next token attends; packed ones by the bytes that they take."""
        return round(self.run.cache.mean_seen())

    @property
    def held(self) -> int:
        return round(self.run.cache.mean_entries())

    @property
    def peak(self) -> int:
        return self.run.peak

    @property
    def live_bytes(self) -> int:
        return self.run.cache.logical_bytes()

    def tensors(self) -> list[Tensor]:
        return self.run.cache.tensors()
