"""A KV cache that lets go of entries: what is removed is freed, not masked."""

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
"""While text is written token by token, a cache has room for one entry in this many more, and as many may be
dead: together at most one in 32 above what is held, so that nothing is copied whole for every token."""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors: a view holds its whole parent."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        storage: Any = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass(frozen=True)
class MergeStep:
    """Entries of the coming forward pass that are weighted sums of other entries.

    Attributes:
        places: int64 ``[m]`` among all entries, stored and new.
        weights: ``[m, entries]``.
        turns: cosine and sine ``[entries, d / 2]`` of every entry's rotation by layer, if keys are averaged
            without it; None for layers that turn nothing.
    """

    places: Tensor
    weights: Tensor
    turns: tuple[tuple[Tensor, Tensor] | None, ...] = ()

    def applied(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, entries, width]`` of a layer, with the mixed entries in place."""
        turn = self.turns[layer] if self.turns else None
        plain = keys if turn is None else rotated(keys, turn[0], -turn[1])
        mixed = self.weights.to(plain.dtype) @ plain
        if turn is not None:
            mixed = rotated(mixed, turn[0][self.places], turn[1][self.places])
        sums = self.weights.to(values.dtype) @ values
        return (
            keys.index_copy(-2, self.places, mixed.to(keys.dtype)),
            values.index_copy(-2, self.places, sums.to(values.dtype)),
        )


class EvictingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values ``[batch, heads, entries, width]`` of one layer; positions are the caller's.

    The caller always passes positions and a mask over the stored entries, so the layer need not
    know which tokens its entries stand for. Cropping is refused: a removed entry cannot return.
    """

    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None  # storages that keys and values are the beginning of

    def append(self, keys: Tensor, values: Tensor, holes: Tensor | None) -> None:
        """Store new entries: in the holes that others left, as far as they go, and after those held.

        Args:
            holes: int64, places of dead entries; None to store exactly what is held, without room for
                more.
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
        """Hold these entries, with storages of their own."""
        self.keys, self.values, self._room = keys, values, None

    def keep(self, entries: Tensor) -> None:
        """Keep only these entries. The selection is a copy, so the old storage is freed."""
        self.replace(self.keys.index_select(-2, entries), self.values.index_select(-2, entries))

    def compact(self, last: Tensor, holes: Tensor, held: int) -> None:
        """Move the ``last`` entries into the ``holes`` and let go of everything from place ``held`` on.

        Only what moves is copied. The storage shrinks when it has become more than 1 in 32 too large.
        """
        for stored in (self.keys, self.values):
            stored.index_copy_(-2, holes, stored.index_select(-2, last))
        keys, values = self.keys[:, :, :held], self.values[:, :, :held]
        if self._room is None or self._room[0].shape[-2] - held > max(1, 2 * held // ROOM):
            self.replace(keys.clone(), values.clone())
        else:
            self.keys, self.values = keys, values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row that many times; also where no entry is held, which transformers leaves as it is."""
        self.replace(self.keys.repeat_interleave(repeats, dim=0), self.values.repeat_interleave(repeats, dim=0))


class EvictingCache(Cache):  # type: ignore[misc]
    """A cache of :class:`EvictingLayer`, grown as the model asks for layers.

    Attributes:
        mixing: the entries of the coming forward pass that are computed from others.
        holes: int64, the places that the entries of the coming forward pass go to first; None to
            store exactly what is held.
        begin: place in the text of the first token of the coming forward pass, which some models ask the cache for.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=EvictingLayer)
        self.mixing: MergeStep | None = None
        self.holes: Tensor | None = None
        self.begin = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Where the coming tokens stand in the text, whatever has been removed before them."""
        return self.begin

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what a layer computed; entries that are mixed from others are computed here."""
        while len(self.layers) <= layer_idx:
            self.layers.append(EvictingLayer())
        layer = self.layers[layer_idx]
        layer.append(key_states, value_states, self.holes)
        if self.mixing is not None:
            layer.replace(*self.mixing.applied(layer.keys, layer.values, layer_idx))
        return layer.keys, layer.values

    def keep(self, entries: Tensor) -> None:
        """Keep only these entries (int64) in every layer and row."""
        for layer in self.layers:
            layer.keep(entries)

    def compact(self, last: Tensor, holes: Tensor, held: int) -> None:
        """In every layer and row, move the ``last`` entries into the ``holes`` of dead ones; ``held`` remain."""
        for layer in self.layers:
            layer.compact(last, holes, held)

    def crop(self, max_length: int) -> None:
        """Refused: a removed entry cannot return.

        Raises:
            UserError: always; assisted decoding and prompt lookup take back what they fed.
        """
        raise UserError(
            f"{type(self).__name__} cannot be cropped: removed entries do not return.",
            "Do without assisted decoding and prompt lookup.",
        )

    def entries(self) -> int:
        """Entries held per layer and row."""
        return int(self.layers[0].keys.shape[-2]) if self.layers else 0

    def tensors(self) -> list[Tensor]:
        return [t for layer in self.layers for t in (layer.keys, layer.values)]

    def entry_bytes(self) -> int:
        """Bytes of one entry in all layers and rows, by the shape of the tensors."""
        return sum(t.element_size() * t.shape[0] * t.shape[1] * t.shape[-1] for t in self.tensors())

    def logical_bytes(self) -> int:
        """Bytes of the entries held, by shape."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def physical_bytes(self) -> int:
        """Bytes of the distinct storages that are alive."""
        return storage_bytes(self.tensors())
