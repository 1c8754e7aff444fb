"""One dense forward pass in which the text after a prompt attends to a part of the prompt only, by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.models.attention_hooks import OBSERVER


class Masks:
    """What every layer and head attends in one pass: the prompt causally, then what was kept of it."""

    def __init__(self, layers: Sequence[Tensor], heads: int, prompt: int, length: int) -> None:
        self.masks = []
        for positions in layers:
            seen = torch.zeros(len(positions), length + 1, dtype=torch.bool)
            seen = seen.scatter_(-1, positions.masked_fill(positions < 0, length), True)[:, :length]
            seen[:, prompt:] = True
            mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(positions), 1, 1)
            mask[:, prompt:] &= seen[:, None]
            self.masks.append(mask.repeat_interleave(heads // len(positions), 0)[None])

    def mask(self, layer: int, *_: Any) -> Tensor:
        return self.masks[layer]

    def attend(self, *_: Any) -> None:
        pass

    def observe(self, *_: Any) -> None:
        pass


def dense_logits(model: Any, ids: Tensor, held: Sequence[Tensor], prompt: int) -> Tensor:
    """Logits ``[n, vocabulary]`` of a text ``[1, n]``, of whose first tokens only those that are held are seen later.

    Args:
        held: for each layer the positions ``[KV heads, entries]``; -1 for none.
        prompt: number of tokens that see everything before them.
    """
    token = OBSERVER.set(Masks(held, model.config.num_attention_heads, prompt, ids.shape[1]))
    try:
        with torch.no_grad():
            logits: Tensor = model(
                input_ids=ids, use_cache=False, attention_mask=torch.ones(1, 1, 1, 1).bool(),
                position_ids=torch.arange(ids.shape[1])[None],
            ).logits[0]
    finally:
        OBSERVER.reset(token)
    return logits
