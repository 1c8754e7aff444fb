"""Random cache contents, for profiles that do not read a prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kvbench.cache.shape import cache_shape
from kvbench.models.configuration import text_config


def random_entries(model: nn.Module, batch: int, entries: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values ``[batch, heads, entries, width]`` of every layer: seeded samples of a normal distribution.

    All rows of the batch are equal, which does not affect timings and makes sampling faster.
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
    """Random logits ``[batch, vocabulary]``, from a seed."""
    like = next(model.parameters())
    generator = torch.Generator(like.device).manual_seed(seed)
    size = int(text_config(model.config).vocab_size)
    return torch.empty(batch, size, dtype=like.dtype, device=like.device).normal_(generator=generator)
