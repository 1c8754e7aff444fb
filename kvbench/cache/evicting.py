"""A KV cache with real eviction: removed entries are freed, not masked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvbench.errors import UserError
from kvbench.models.rope import rotated

ROOM = 64
"""During decoding, a cache has spare room for 1 / ROOM of its entries, and up to 1 / ROOM may be dead (never seen
again, not yet freed): together at most 1/32 above what is held, so that tensors are not copied for every token."""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors; a view counts with its whole storage."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        storage: Any = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass(frozen=True)
class MergeStep:
    """Entries of the next forward pass that are weighted sums of other entries.

    Attributes:
        indices: int64 ``[m]``, indices of the sums among all entries, stored and new.
        weights: ``[m, entries]``, the weight of every entry in each sum.
        rotations: by layer, cosine and sine ``[entries, d / 2]`` of every entry's rotation, if keys are averaged
            before the rotary embedding; None for layers that do not rotate.
    """

    indices: Tensor
    weights: Tensor
    rotations: tuple[tuple[Tensor, Tensor] | None, ...] = ()

    def applied(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, entries, width]`` of a layer, with the sums filled in."""
        rotation = self.rotations[layer] if self.rotations else None
        plain = keys if rotation is None else rotated(keys, rotation[0], -rotation[1])
        mixed = self.weights.to(plain.dtype) @ plain
        if rotation is not None:
            mixed = rotated(mixed, rotation[0][self.indices], rotation[1][self.indices])
        sums = self.weights.to(values.dtype) @ values
        return (
            keys.index_copy(-2, self.indices, mixed.to(keys.dtype)),
            values.index_copy(-2, self.indices, sums.to(values.dtype)),
        )


class EvictingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values ``[batch, heads, entries, width]`` of one layer.

    The caller passes positions and a mask over the stored entries to the model, so the layer does not
    know which tokens its entries belong to. Cropping is refused: removed entries cannot be restored.
    """

    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None  # tensors with spare room, of which keys and values are views

    def append(self, keys: Tensor, values: Tensor, holes: Tensor | None) -> None:
        """Store new entries: in the holes first, and the rest after the entries held.

        Args:
            holes: int64, indices of dead entries to overwrite; None to store exactly what is held,
                without spare room.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        held = self.keys.shape[-2]
        if holes is None:
            self.replace(torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2))
            return
        holes = holes.to(keys.device)
        total = held + keys.shape[-2] - len(holes)
        if self._room is None or self._room[0].shape[-2] < total:
            shape = (*keys.shape[:2], total + max(1, total // ROOM))
            self._room = keys.new_empty(*shape, keys.shape[-1]), values.new_empty(*shape, values.shape[-1])
            self._room[0][:, :, :held], self._room[1][:, :, :held] = self.keys, self.values
        for room, new in zip(self._room, (keys, values), strict=True):
            if len(holes):
                room.index_copy_(-2, holes, new[:, :, : len(holes)])
            room[:, :, held:total] = new[:, :, len(holes) :]
        self.keys, self.values = self._room[0][:, :, :total], self._room[1][:, :, :total]

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Replace all entries by these tensors, without spare room."""
        self.keys, self.values, self._room = keys, values, None

    def keep(self, entries: Tensor) -> None:
        """Keep only these entries (int64 indices). They are copied, so that the old storage is freed."""
        self.replace(self.keys.index_select(-2, entries), self.values.index_select(-2, entries))

    def compact(self, last: Tensor, holes: Tensor, held: int) -> None:
        """Move the ``last`` entries into the ``holes``, and drop everything from index ``held`` on.

        Only moved entries are copied. The storage is reallocated once it is more than 1/32 too large.
        """
        for stored in (self.keys, self.values):
            stored.index_copy_(-2, holes, stored.index_select(-2, last))
        keys, values = self.keys[:, :, :held], self.values[:, :, :held]
        if self._room is None or self._room[0].shape[-2] - held > max(1, 2 * held // ROOM):
            self.replace(keys.clone(), values.clone())
        else:
            self.keys, self.values = keys, values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; unlike in transformers, also if no entry is held."""
        self.replace(self.keys.repeat_interleave(repeats, dim=0), self.values.repeat_interleave(repeats, dim=0))


class EvictingCache(Cache):  # type: ignore[misc]
    """A cache of :class:`EvictingLayer`; layers are added when the model first uses them.

    Attributes:
        merge_step: the entries of the next forward pass that are sums of others; None if there are none.
        holes: int64, indices that the entries of the next forward pass are stored at first; None to
            store exactly what is held.
        begin: position of the first token of the next forward pass, which some models ask the cache for.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=EvictingLayer)
        self.merge_step: MergeStep | None = None
        self.holes: Tensor | None = None
        self.begin = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Position of the next token in the text, however many entries have been removed."""
        return self.begin

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a layer, and compute the entries that are sums of others."""
        while len(self.layers) <= layer_idx:
            self.layers.append(EvictingLayer())
        layer = self.layers[layer_idx]
        layer.append(key_states, value_states, self.holes)
        if self.merge_step is not None:
            layer.replace(*self.merge_step.applied(layer.keys, layer.values, layer_idx))
        return layer.keys, layer.values

    def keep(self, entries: Tensor) -> None:
        """Keep only these entries (int64 indices) in every layer and row."""
        for layer in self.layers:
            layer.keep(entries)

    def compact(self, last: Tensor, holes: Tensor, held: int) -> None:
        """In every layer and row, move the ``last`` entries into the ``holes``, so that ``held`` entries remain."""
        for layer in self.layers:
            layer.compact(last, holes, held)

    def crop(self, max_length: int) -> None:
        """Refused: removed entries cannot be restored.

        Raises:
            UserError: always; assisted decoding and prompt lookup need to crop.
        """
        raise UserError(
            f"{type(self).__name__} cannot be cropped: removed entries do not return.",
            "Do without assisted decoding and prompt lookup.",
        )

    def entries(self) -> int:
        """Number of entries held, per layer, row and head."""
        return int(self.layers[0].keys.shape[-2]) if self.layers else 0

    def tensors(self) -> list[Tensor]:
        return [t for layer in self.layers for t in (layer.keys, layer.values)]

    def entry_bytes(self) -> int:
        """Bytes of one entry over all layers, rows and heads, from the shapes of the tensors."""
        return sum(t.element_size() * t.shape[0] * t.shape[1] * t.shape[-1] for t in self.tensors())

    def logical_bytes(self) -> int:
        """Bytes of the entries held, from the shapes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def physical_bytes(self) -> int:
        """Bytes of the distinct storages that hold them, spare room included."""
        return storage_bytes(self.tensors())
