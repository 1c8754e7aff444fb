"""IC-Former (Wang et al., EMNLP 2024 Findings, arXiv 2406.13618)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvbench.methods.memories.memory import Memory
from kvbench.methods.memories.writer import ParallelWriter, embedded, last_states
from kvbench.methods.options import option
from kvbench.models.embeddings import spread_of
from kvbench.models.rope import rotated

HEAD = 64
"""Width of an attention head."""
BASE = 10_000.0
"""Base of the rotations."""


class CrossLayer(nn.Module):
    """Digests attend to a context and, causally, to each other; then a SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_inner = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        inner = width * 8 // 3
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, digests: Tensor, context: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Digests ``[batch, k, width]`` after attending to themselves and to a context ``[batch, c, width]``.

        Args:
            rotation: cosine and sine ``[c + k, head / 2]`` of all places; digests stand behind the context.
            mask: bool ``[k, c + k]``.
        """
        normed, k = self.norm(digests), digests.shape[1]
        seen = torch.cat([context, normed], 1)
        query, key, value = (self._split(part) for part in (self.query(normed), self.key(seen), self.value(seen)))
        cos, sin = rotation
        found = functional.scaled_dot_product_attention(
            rotated(query, cos[-k:], sin[-k:]).to(value.dtype), rotated(key, cos, sin).to(value.dtype), value,
            attn_mask=mask,
        )
        digests = digests + self.out(found.transpose(1, 2).flatten(2))
        inner = self.norm_inner(digests)
        result: Tensor = digests + self.down(functional.silu(self.gate(inner)) * self.up(inner))
        return result

    def _split(self, x: Tensor) -> Tensor:
        """``[batch, heads, n, head]`` of ``[batch, n, width]``."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class DigestWriter(ParallelWriter):
    """Learnt digests that cross-attend to the embeddings of a chunk in a small transformer of their own.

    Args:
        encodes: whether they attend to the model's last hidden states instead, which takes a forward pass.
    """

    def __init__(self, model: nn.Module, k: int, layers: int, encodes: bool) -> None:
        super().__init__()
        spread = spread_of(model)
        width = len(spread.mean)
        self.encodes = encodes
        self.digests = nn.Parameter(0.02 * torch.randn(k, width))
        self.heads = next(heads for heads in range(max(1, width // HEAD), 0, -1) if width % heads == 0)
        self.layers = nn.ModuleList(CrossLayer(width, self.heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.scale = nn.Parameter(spread.overall)

    def read(self, model: nn.Module, ids: Tensor) -> Tensor:
        text = embedded(model, ids)
        states = last_states(model, text) if self.encodes else text
        context = functional.rms_norm(states, states.shape[-1:])
        k, c = len(self.digests), ids.shape[1]
        mask = torch.ones(k, c + k, dtype=torch.bool, device=ids.device).tril(c)
        head = context.shape[-1] // self.heads
        angles = torch.arange(c + k, device=ids.device)[:, None] * BASE ** (
            -torch.arange(0, head // 2 * 2, 2, device=ids.device) / head
        )
        digests = self.digests.to(context.dtype).expand(len(ids), -1, -1)
        for layer in self.layers:
            digests = layer(digests, context, (angles.cos(), angles.sin()), mask)
        rows: Tensor = self.scale * self.norm(digests)
        return rows


@dataclass(frozen=True)
class ICFormer(Memory):
    """Replaces each chunk by ``n_comp`` rows that a small cross-attention network makes of its input embeddings.

    ``layers`` layers of cross-attention with SwiGLU: digests attend to the chunk's embeddings and causally to each
    other, rotated to the places behind them. The model does not read the chunk (unless ``encode=true``), which makes
    this the cheapest of the learnt memories.

    Departures from the released code: digests start at small noise instead of zero; embeddings are scaled to unit
    variance, and rows to the spread of embeddings; chunks are short (set by the ratio), and trained with the
    loss on all text instead of auto-encoding and instructions; places as for ``icae``.
    """

    name = "ic-former"
    summary = "rows made of each chunk's embeddings by a small cross-attention network"
    paper = "arXiv 2406.13618"

    layers: int = option(3, "cross-attention layers", least=1, most=12, trained=True)
    encode: bool = option(False, "digests attend to the model's last hidden states", trained=True)

    def positions_read(self, chunks: Sequence[int]) -> int:
        return super().positions_read(chunks) if self.encode else 0

    def new_writer(self, model: nn.Module) -> DigestWriter:
        return DigestWriter(model, self.n_comp, self.layers, self.encode)
