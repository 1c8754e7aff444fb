"""Entries of low rank, stored as their coordinates (LoRC, arXiv 2410.03111)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvbench.cache.stored import StoredEntries
from kvbench.models.rope import rotated


@dataclass(frozen=True)
class Basis:
    """What the keys, or the values, of a layer are combinations of.

    Attributes:
        columns: orthonormal, ``[heads * width, rank]``.
        bias: added to every combination, ``[heads * width]``; None if there is none.
    """

    columns: Tensor
    bias: Tensor | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Basis:
        """The basis itself: it belongs to the model, whose caches share it."""
        return self

    def latents(self, vectors: Tensor) -> Tensor:
        """Coordinates ``[..., rank]`` of vectors ``[..., heads * width]``, in float32."""
        vectors = vectors.float()
        return (vectors if self.bias is None else vectors - self.bias) @ self.columns

    def vectors(self, latents: Tensor) -> Tensor:
        """The vectors ``[..., heads * width]`` of coordinates ``[..., rank]``, in float32."""
        found = latents.float() @ self.columns.T
        return found if self.bias is None else found + self.bias


@dataclass(frozen=True)
class Latents(StoredEntries):
    """The coordinates of consecutive tokens' keys, before their rotation, and values; all heads of a layer together.

    Keys and values are rebuilt, and keys rotated to their positions, whenever they are attended. The bases are those of
    the model's weights: they belong to the model, and are not counted.

    Attributes:
        keys, values: ``[batch, entries, rank]``.
        of_keys, of_values: what they are coordinates in.
        heads: number of KV heads.
        first: position of the first token.
        inv_freq: angle per position of each coordinate pair, ``[d / 2]``; None if the layer does not rotate.
    """

    keys: Tensor
    values: Tensor
    of_keys: Basis
    of_values: Basis
    heads: int
    first: int
    inv_freq: Tensor | None

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, bases: tuple[Basis, Basis], first: int, inv_freq: Tensor | None
    ) -> Latents:
        """Store keys and values ``[batch, heads, entries, width]`` of tokens from position ``first`` on."""
        plain = _turned(keys, first, inv_freq, back=True)
        latents = [
            basis.latents(tensor.transpose(1, 2).flatten(2)).to(tensor.dtype)
            for basis, tensor in zip(bases, (plain, values), strict=True)
        ]
        return cls(latents[0], latents[1], *bases, keys.shape[1], first, inv_freq)

    def unpack(self, room: int = 0) -> tuple[Tensor, Tensor]:
        keys, values = (
            basis.vectors(latents).to(latents.dtype).view(*latents.shape[:2], self.heads, -1).transpose(1, 2)
            for basis, latents in ((self.of_keys, self.keys), (self.of_values, self.values))
        )
        found = []
        for tensor in (_turned(keys, self.first, self.inv_freq), values):
            batch, heads, entries, width = tensor.shape
            whole = tensor.new_empty(batch, heads, entries + room, width)
            whole[:, :, :entries] = tensor
            found.append(whole)
        return found[0], found[1]

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]

    def repeated(self, repeats: int) -> StoredEntries:
        keys, values = (tensor.repeat_interleave(repeats, dim=0) for tensor in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def after(self, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, ...]:
        """One form of all: those of the earlier tokens, which must be of this kind, and these."""
        if not earlier:
            return (self,)
        keys, values = (torch.cat(pair, 1) for pair in zip(earlier[0].tensors(), self.tensors(), strict=True))
        return (replace(self, keys=keys, values=values, first=self.first - keys.shape[1] + self.keys.shape[1]),)


def _turned(keys: Tensor, first: int, inv_freq: Tensor | None, back: bool = False) -> Tensor:
    """Keys ``[batch, heads, entries, width]`` rotated to the positions from ``first`` on, or back from there."""
    if inv_freq is None:
        return keys
    places = torch.arange(first, first + keys.shape[2], device=keys.device)[:, None]
    angle = places * inv_freq.to(keys.device)
    return rotated(keys, angle.cos(), -angle.sin() if back else angle.sin())
