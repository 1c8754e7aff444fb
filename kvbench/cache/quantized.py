"""Quantised entries: as in KIVI (arXiv 2402.02750), and in 8-bit floating point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from kvbench.cache.stored import StoredEntries, with_room


@dataclass(frozen=True)
class Codes:
    """Integer codes of ``bits`` bits, with a minimum and a step for every group of them.

    Attributes:
        packed: uint8 ``[..., n * bits / 8]``, the codes along the last axis, packed into bytes.
        least, step: ``[..., n / group]``, minimum and step; bfloat16 if the numbers were, float16 otherwise.
    """

    packed: Tensor
    least: Tensor
    step: Tensor
    bits: int

    @classmethod
    def of(cls, numbers: Tensor, bits: int, group: int) -> Codes:
        """Quantise along the last axis, in groups of ``group``.

        Args:
            numbers: ``[..., n]``; n is a multiple of ``group``, and ``group * bits`` of 8.
        """
        grouped = numbers.float().reshape(*numbers.shape[:-1], -1, group)
        least, most = grouped.amin(-1), grouped.amax(-1)
        half = torch.bfloat16 if numbers.dtype == torch.bfloat16 else torch.float16
        least, step = least.to(half), ((most - least) / (2**bits - 1)).to(half)
        # Minimum and step are rounded first, so that each code is the nearest one after dequantisation.
        divisor = torch.where(step > 0, step, torch.ones_like(step)).float()
        codes = ((grouped - least.float()[..., None]) / divisor[..., None]).round().clamp(0, 2**bits - 1)
        return cls(_joined(codes.flatten(-2).to(torch.uint8), bits), least, step, bits)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The dequantised numbers ``[..., n]``."""
        grouped = _split(self.packed, self.bits).reshape(*self.least.shape, -1)
        numbers = grouped.mul_(self.step.float()[..., None]).add_(self.least.float()[..., None])
        return numbers.flatten(-2).to(dtype)

    def tensors(self) -> list[Tensor]:
        return [self.packed, self.least, self.step]

    def map(self, function: Callable[[Tensor], Tensor]) -> Codes:
        return replace(self, packed=function(self.packed), least=function(self.least), step=function(self.step))

    def followed_by(self, other: Codes, dim: int) -> Codes:
        packed, least, step = (torch.cat(pair, dim) for pair in zip(self.tensors(), other.tensors(), strict=True))
        return Codes(packed, least, step, self.bits)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 ``[..., n]``, into bytes of 8 / bits codes each."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte).unbind(-1)
    return reduce(torch.bitwise_or, (part << (bits * place) for place, part in enumerate(parts)))


def _split(packed: Tensor, bits: int) -> Tensor:
    """Unpack codes into float32 ``[..., n]``."""
    per_byte = 8 // bits
    codes = torch.empty(*packed.shape, per_byte, device=packed.device)
    for place in range(per_byte):
        codes[..., place] = (packed >> (bits * place)) & (2**bits - 1)
    return codes.flatten(-2)


@dataclass(frozen=True)
class Quantised(StoredEntries):
    """Keys quantised per channel over groups of entries, values per entry over groups of channels.

    Attributes:
        keys: codes of the transposed keys ``[batch, heads, width, entries]``.
        values: codes of ``[batch, heads, entries, width]``.
        dtype: dtype of the unpacked tensors.
    """

    keys: Codes
    values: Codes
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, bits: int, group: int) -> Quantised:
        """Quantise ``[batch, heads, entries, width]``; entries are a multiple of ``group``, width of 8 / bits."""
        width = values.shape[-1]
        channels = group if width % group == 0 else width  # one group if the width is no multiple
        return cls(
            Codes.of(keys.transpose(-1, -2), bits, group), Codes.of(values, bits, channels), keys.dtype,
        )

    def unpack(self, room: int = 0) -> tuple[Tensor, Tensor]:
        return (
            with_room(self.keys.numbers(self.dtype).transpose(-1, -2), room),
            with_room(self.values.numbers(self.dtype), room),
        )

    def tensors(self) -> list[Tensor]:
        return [*self.keys.tensors(), *self.values.tensors()]

    def repeated(self, repeats: int) -> StoredEntries:
        def more(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(repeats, dim=0)

        return replace(self, keys=self.keys.map(more), values=self.values.map(more))

    def after(self, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, ...]:
        """Append to earlier codes: entries that were quantised once are not quantised again."""
        if not earlier or not isinstance(earlier[-1], Quantised):
            return (*earlier, self)
        last = earlier[-1]
        keys, values = last.keys.followed_by(self.keys, -1), last.values.followed_by(self.values, -2)
        return (*earlier[:-1], replace(self, keys=keys, values=values))


@dataclass(frozen=True)
class Float8(StoredEntries):
    """Keys and values in 8-bit floating point (e4m3); scales per row and head are those of the first packed entries.

    Attributes:
        keys, values: float8 ``[batch, heads, entries, width]``.
        scales: float32 ``[2, batch, heads, 1, 1]``.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, scales: Tensor | None = None) -> Float8:
        """Quantise, with the ``scales`` of earlier entries if there are any."""
        kind = torch.float8_e4m3fn
        most = torch.finfo(kind).max
        if scales is None:
            scales = torch.stack([t.float().abs().amax((-2, -1), keepdim=True) for t in (keys, values)]) / most
            scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        small = [
            (tensor.float() / scale).clamp(-most, most).to(kind)
            for tensor, scale in zip((keys, values), scales, strict=True)
        ]
        return cls(small[0], small[1], scales, keys.dtype)

    def unpack(self, room: int = 0) -> tuple[Tensor, Tensor]:
        # By table look-up: converting from this format is slow on a CPU.
        numbers = torch.arange(256, dtype=torch.uint8, device=self.keys.device).view(self.keys.dtype).float()
        keys, values = (
            with_room((numbers[tensor.view(torch.uint8).int()] * scale).to(self.dtype), room)
            for tensor, scale in zip((self.keys, self.values), self.scales, strict=True)
        )
        return keys, values

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.scales]

    def repeated(self, repeats: int) -> StoredEntries:
        keys, values = (
            t.view(torch.uint8).repeat_interleave(repeats, dim=0).view(t.dtype) for t in (self.keys, self.values)
        )
        return replace(self, keys=keys, values=values, scales=self.scales.repeat_interleave(repeats, dim=1))

    def after(self, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, ...]:
        if not earlier or not isinstance(earlier[-1], Float8):
            return (*earlier, self)
        last = earlier[-1]
        joined = [
            torch.cat([a.view(torch.uint8), b.view(torch.uint8)], -2).view(a.dtype)
            for a, b in ((last.keys, self.keys), (last.values, self.values))
        ]
        return (*earlier[:-1], replace(self, keys=joined[0], values=joined[1]))
