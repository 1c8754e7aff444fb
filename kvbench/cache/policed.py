"""A cache whose entries are chosen while it is read: each row and head of a layer holds its own.

New entries are held as keys and values, older ones in whatever form the policy gives them (fewer bits, fewer
channels, as many per head as each was given); those are unpacked for the one forward pass that attends them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.cache.evicting import EvictingCache, EvictingLayer
from kvbench.cache.packed import Packed, Ragged
from kvbench.errors import UserError
from kvbench.models.attention import WATCHER
from kvbench.models.rotary import rotated

NO_HOLES = torch.empty(0, dtype=torch.long)


class PolicedLayer(EvictingLayer):
    """Keys and values ``[batch, heads, entries, width]`` behind what is packed, and what a policy knows of them all.

    Attributes:
        packed: the older entries, in other forms.
        positions: int64 ``[batch, heads, entries]``, the place of each entry in the text, packed ones first;
            ascending, after -1 where a head has fewer entries than another.
        sums: float32 ``[batch, heads, entries]``, attention that each entry has received, where it is recorded.
        queries: the last queries ``[batch, query heads, w, width]``, where they are; None before any.
        moments: of the queries so far, where they are taken: how many, their sum ``[batch, query heads, width]`` and
            the sum of their outer products.
        scaling: of the layer's attention.
        focus: copies of the entries that are attended until the next look at all of them, with their positions, and
            how many entries there were then; None if all are attended.
        is_ragged: whether some heads have fewer entries than others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.packed: tuple[Packed, ...] = ()
        self.positions = torch.empty(0, dtype=torch.long)
        self.sums = torch.empty(0)
        self.queries: Tensor | None = None
        self.moments: tuple[int, Tensor, Tensor] | None = None
        self.scaling = 1.0
        self.focus: tuple[Tensor, Tensor, Tensor, int] | None = None
        self.is_ragged = False

    @property
    def held(self) -> int:
        """Entries of the head that has the most."""
        return int(self.positions.shape[-1])

    @property
    def first_plain(self) -> int:
        """The first entry that is not packed."""
        return self.held - int(self.keys.shape[-2])

    def extend(self, keys: Tensor, values: Tensor, read: int) -> None:
        """Store the entries of the tokens from ``read`` on."""
        new = torch.arange(read, read + keys.shape[-2], device=keys.device).expand(keys.shape[:-1])
        if not self.is_initialized:
            self.positions, self.sums = new[..., :0], new.float()[..., :0]
        self.append(keys, values, NO_HOLES)
        self.positions = torch.cat([self.positions, new], -1)
        self.sums = torch.cat([self.sums, torch.zeros_like(new, dtype=torch.float32)], -1)

    def present(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all entries."""
        if not self.packed:
            return self.keys, self.values
        parts = [*(packed.unpack() for packed in self.packed), (self.keys, self.values)]
        keys, values = (torch.cat(tensors, -2) for tensors in zip(*parts, strict=True))
        return keys, values

    def attended(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the entries in focus, and of those that came after."""
        if self.focus is None:
            return self.present()
        keys, values, _, then = self.focus
        since = then - self.first_plain
        return torch.cat([keys, self.keys[:, :, since:]], -2), torch.cat([values, self.values[:, :, since:]], -2)

    def seen(self) -> Tensor:
        """The positions of the entries that will be attended, int64 ``[batch, heads, entries]``."""
        if self.focus is None:
            return self.positions
        return torch.cat([self.focus[2], self.positions[..., self.focus[3] :]], -1)

    def look_at(self, entries: Tensor) -> None:
        """Attend only these entries from now on, and those to come; all of them stay."""
        keys, values = self.present()
        wide = entries[..., None].expand(*entries.shape, keys.shape[-1])
        tall = entries[..., None].expand(*entries.shape, values.shape[-1])
        self.focus = keys.gather(-2, wide), values.gather(-2, tall), self.positions.gather(-1, entries), self.held

    def choose(self, entries: Tensor, present: tuple[Tensor, Tensor]) -> None:
        """Keep only these entries of ``present``, copied, so that the rest is freed.

        Args:
            entries: int64 ``[batch, heads, kept]``, ascending; -1 in front where a head keeps fewer than another.
            present: keys and values of all entries, as they shall be stored.
        """
        keys, values = present
        at, none = entries.clamp(min=0), entries < 0
        self.is_ragged = bool(none.any())
        if self.is_ragged:
            self.packed = (Ragged.of(keys, values, entries),)
            self.replace(keys[:, :, :0].clone(), values[:, :, :0].clone())
        else:
            self.packed = ()
            wide, tall = (at[..., None].expand(*at.shape, t.shape[-1]) for t in (keys, values))
            self.replace(keys.gather(-2, wide), values.gather(-2, tall))
        self.positions = self.positions.gather(-1, at).masked_fill(none, -1)
        self.sums = self.sums.gather(-1, at).masked_fill(none, 0)

    def pack(self, packed: Packed, count: int) -> None:
        """The first ``count`` of the entries that are held as they are are now ``packed``."""
        self.packed = packed.after(self.packed)
        self.replace(self.keys[:, :, count:].clone(), self.values[:, :, count:].clone())

    def tensors(self) -> list[Tensor]:
        copies = [] if self.focus is None else [*self.focus[:2]]
        return [self.keys, self.values, *(t for packed in self.packed for t in packed.tensors()), *copies]

    def entry_bytes(self) -> int:
        """Bytes of an entry that is held as it is, in all rows and heads."""
        return sum(t.element_size() * t.shape[0] * t.shape[1] * t.shape[-1] for t in (self.keys, self.values))

    def entries(self) -> float:
        """Entries held per row and head; packed ones by the bytes that they take."""
        if not self.packed:
            return self.held
        taken = sum(t.numel() * t.element_size() for packed in self.packed for t in packed.tensors())
        return float(self.keys.shape[-2]) + taken / self.entry_bytes()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)

        def more(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(repeats, dim=0)

        self.packed = tuple(packed.repeated(repeats) for packed in self.packed)
        self.positions, self.sums = more(self.positions), more(self.sums)
        self.queries = None if self.queries is None else more(self.queries)
        if self.moments is not None:
            self.moments = self.moments[0], more(self.moments[1]), more(self.moments[2])
        if self.focus is not None:
            self.focus = more(self.focus[0]), more(self.focus[1]), more(self.focus[2]), self.focus[3]


class PolicedCache(EvictingCache):
    """A cache of :class:`PolicedLayer`.

    Attributes:
        read: text tokens read before the coming forward pass.
        turned: of the first entries, how many are read at their place in the cache instead of that in the text, as
            in StreamingLLM, where the others are at their place anyway.
        speeds: angle per position of each pair of coordinates, for these.
        looks: whether the coming forward pass attends all entries, where layers have some in focus.
    """

    layers: list[PolicedLayer]

    def __init__(self, turned: int = 0, speeds: Tensor | None = None) -> None:
        super().__init__()
        self.read, self.turned, self.speeds, self.looks = 0, turned, speeds, False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what a layer computed; entries are returned as if nothing lay between them, if they are turned.

        Raises:
            UserError: the model is called by itself, with a mask of its own.
        """
        if WATCHER.get() is None:
            raise UserError(
                f"{type(self).__name__} is filled by kvbench.policing.Policing only: rows and heads hold different "
                "entries, which the model's own mask, left-padded batches, beams and generate() do not know.",
                "Read texts of one length with Policing.stream, or write with PolicedContinuation.",
            )
        while len(self.layers) <= layer_idx:
            self.layers.append(PolicedLayer())
        layer = self.layers[layer_idx]
        before = layer.held
        layer.extend(key_states, value_states, self.read)
        keys, values = layer.present() if self.looks else layer.attended()
        count = min(self.turned, before)
        if not count or self.speeds is None or self.read == before:
            return keys, values
        # Rotations are relative: turning an entry on by the gap behind it is the same as counting all others back.
        # It is turned anew from what is stored, for rounding would add up.
        places = torch.arange(self.read - before, self.read - before + count, device=keys.device)
        angle = (places - layer.positions[..., :count])[..., None] * self.speeds.to(keys.device)
        first = rotated(keys[:, :, :count], angle.cos(), angle.sin())
        return torch.cat([first, keys[:, :, count:]], -2), values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beams that leave one another's entries behind are not followed.

        Raises:
            UserError: always.
        """
        raise UserError(f"{type(self).__name__} does not follow beams.", "Sample, or decode greedily.")

    def mean_entries(self) -> float:
        """Entries held per row and head, over layers; packed ones by the bytes that they take."""
        return sum(layer.entries() for layer in self.layers) / max(1, len(self.layers))

    def mean_seen(self) -> float:
        """Entries that the next forward pass will attend, per row and head, over layers."""
        found = [layer.entries() if layer.focus is None else layer.seen().shape[-1] for layer in self.layers]
        return sum(found) / max(1, len(found))

    def most_entries(self) -> int:
        return max((layer.held for layer in self.layers), default=0)

    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    def entry_bytes(self) -> int:
        """Bytes of one entry that is held as it is, in all layers and rows."""
        return sum(layer.entry_bytes() for layer in self.layers)
