"""Sessions whose predictions are mixed with those of a memory of hidden states and the tokens that followed them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache.evicting import EvictingLayer, storage_bytes
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.session import CacheBytes, Scored


@dataclass
class OutputMemorySession(LayoutSession):
    """As its base; every forward pass also looks up what followed states like the present ones.

    Attributes:
        mix: share of the prediction that comes from memory.
        sharpness: factor of cosines before their softmax.
        pairs: hidden states ``[batch, 1, pairs, width]`` and the ids that followed ``[batch, 1, pairs, 1]``.
        last: ``[batch, 1, width]``, the hidden state whose next token is not known yet; empty before any text.
    """

    mix: float = 0.0
    sharpness: float = 1.0
    pairs: EvictingLayer = field(default_factory=EvictingLayer)
    last: Tensor = field(default_factory=lambda: torch.empty(0))

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        self.pairs, self.last = EvictingLayer(), torch.empty(0)
        yield from super().prefill(ids, first, ahead)

    def _forward(self, inputs: Tensor, keep: Tensor) -> Tensor:
        seen: list[Tensor] = []
        model: Any = self.reader.model
        hook = model.get_decoder().register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
        try:
            logits = super()._forward(inputs, keep)
        finally:
            hook.remove()
        with self.reader.overhead():
            return self._mixed(logits, seen[0], inputs, keep.to(inputs.device))

    def _mixed(self, logits: Tensor, states: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        """Log-probabilities ``[batch, keep, vocabulary]``; the tokens fed are remembered, but for text that is read
        behind the context.

        Args:
            states: the last hidden states ``[batch, fed, width]`` of these tokens.
        """
        before = self.pairs.keys.shape[-2] if self.pairs.is_initialized else 0
        if self.is_kept_whole:
            self._remember(self.last, ids[:, :1])
            self.last = self.last[:, :0]
            known = torch.full_like(keep, self.pairs.keys.shape[-2])
        else:
            began = self.last.numel() > 0
            followed = torch.cat([self.last, states[:, :-1]], 1) if began else states[:, :-1]
            self._remember(followed, ids if began else ids[:, 1:])
            self.last = states[:, -1:].clone()
            known = before + began + keep  # pairs whose next token has been read
        if not len(keep) or not self.mix or not self.pairs.is_initialized:
            return logits
        keys, following = self.pairs.keys[:, 0], self.pairs.values[:, 0, :, 0].long()
        queries = functional.normalize(states[:, keep].float(), dim=-1)
        scores = self.sharpness * queries @ functional.normalize(keys.float(), dim=-1).transpose(1, 2)
        hidden = torch.arange(keys.shape[1], device=ids.device) >= known[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)  # none is known at first
        remembered = torch.zeros(logits.shape, device=logits.device).scatter_add_(
            2, following[:, None].expand(weights.shape), weights
        )
        # In logarithms, where the probability of a token is never 0.
        mixed = torch.logaddexp(
            logits.float().log_softmax(-1) + math.log(1 - self.mix), remembered.log() + math.log(self.mix)
        )
        return torch.where((known > 0)[:, None], mixed, logits.float())

    def _remember(self, states: Tensor, ids: Tensor) -> None:
        """Add pairs: hidden states ``[batch, m, width]`` and the ids ``[batch, m]`` that followed."""
        if states.numel():
            none = torch.empty(0, dtype=torch.long)
            self.pairs.append(states[:, None], ids[:, None, :, None].int(), none)

    def _settle(self, present: Tensor) -> None:
        super()._settle(present)
        self.kept += round(self._pair_bytes() / max(1, self.cache.entry_bytes()))

    def _pair_bytes(self) -> int:
        """Bytes of the pairs, and of the state that is still to become one."""
        return sum(one.numel() * one.element_size() for one in self._remembered())

    def _remembered(self) -> list[Tensor]:
        found = [self.last] if self.last.numel() else []
        return [*found, self.pairs.keys, self.pairs.values] if self.pairs.is_initialized else found

    def expand(self, copies: int) -> None:
        super().expand(copies)
        self.pairs.batch_repeat_interleave(copies)
        self.last = self.last.repeat_interleave(copies, 0)

    def fill(self, batch: int, seed: int) -> None:
        super().fill(batch, seed)
        weights: Tensor = self.reader.model.get_input_embeddings().weight  # type: ignore[operator]
        width = weights.shape[1]
        states = torch.randn(1, self.context, width, generator=torch.Generator().manual_seed(seed)).to(weights)
        states = states.expand(batch, -1, -1)
        self.pairs, self.last = EvictingLayer(), states[:, -1:].clone()
        self._remember(states[:, :-1], torch.zeros(batch, self.context - 1, dtype=torch.long, device=self.device))
        self.kept += round(self._pair_bytes() / self.cache.entry_bytes())

    def bytes(self) -> CacheBytes:
        found = super().bytes()
        entries = self.cache.logical_bytes()
        return CacheBytes(entries + self._pair_bytes(), found.physical + storage_bytes(self._remembered()), found.full)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self._remembered()]
