"""The cache of a policy: each row and head of a layer keeps its own choice of entries.

New entries are plain keys and values. Older ones may be stored in another form (fewer bits, fewer channels, different
numbers per head), which is unpacked for each forward pass that attends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.cache.evicting import EvictingCache, EvictingLayer
from kvbench.cache.ragged import Ragged
from kvbench.cache.stored import StoredEntries, gather_entries
from kvbench.errors import UserError
from kvbench.models.attention_hooks import OBSERVER
from kvbench.models.rope import rotated

NO_HOLES = torch.empty(0, dtype=torch.long)


class PolicyLayer(EvictingLayer):
    """Plain keys and values ``[batch, heads, entries, width]``, the packed entries before them, and statistics of all.

    Attributes:
        packed: the older entries, stored in another form.
        pending: queries ``[batch, query heads, q, width]`` of the latest tokens, not yet part of the statistics.
        queries: the last w queries ``[batch, query heads, w, width]``, if the policy needs them; None before any.
        moments: number, sum ``[batch, query heads, width]`` and sum of outer products of the queries so far, if the
            policy needs them.
        scaling: scale of the attention logits.
        carried: state ``[batch, ...]`` that the policy returned at the last removal; None for none.
        subset: copies of the entries that are attended until the next step with full attention (RefreshKV), later
            ones included; None if all entries are attended.
        ragged: all entries, if heads hold different numbers of them; None otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.packed: tuple[StoredEntries, ...] = ()
        self.pending: list[Tensor] = []
        self.queries: Tensor | None = None
        self.moments: tuple[int, Tensor, Tensor] | None = None
        self.scaling = 1.0
        self.carried: Tensor | None = None
        self.subset: EvictingLayer | None = None
        self.ragged: Ragged | None = None
        self.read = self._packed_entries = 0
        self._positions = torch.empty(0, dtype=torch.long)
        self._sums, self._weights = torch.empty(0), torch.empty(0)
        self._subset_positions = torch.empty(0, dtype=torch.long)

    @property
    def held(self) -> int:
        """Number of entries of the head that has the most."""
        if self.ragged is not None:
            return self.ragged.longest
        return self._packed_entries + (int(self.keys.shape[-2]) if self.is_initialized else 0)

    @property
    def first_plain(self) -> int:
        """Index of the first entry that is not packed."""
        return self._packed_entries

    @property
    def positions(self) -> Tensor:
        """Position of each entry in the text, int64 ``[batch, heads, entries]``, ascending; packed entries come first.
        A head with fewer entries than another has -1 in front. Computed lazily: entries added since the last call are
        those of the latest tokens."""
        missing = self.held - self._positions.shape[-1]
        if missing or self._positions.dim() == 1:
            shape = (*self.keys.shape[:2], missing)
            new = torch.arange(self.read - missing, self.read, device=self.keys.device).expand(shape)
            self._positions = new if self._positions.dim() == 1 else torch.cat([self._positions, new], -1)
        return self._positions

    @property
    def sums(self) -> Tensor:
        """Attention that each entry has received, if the policy needs it, float32 ``[batch, heads, entries]``."""
        self._sums = self._completed(self._sums, 0)
        return self._sums

    @property
    def weights(self) -> Tensor | None:
        """How many tokens each entry stands for, float32 ``[batch, heads, entries]``; None if each is one token."""
        if self._weights.dim() == 1:
            return None
        self._weights = self._completed(self._weights, 1)
        return self._weights

    def _completed(self, known: Tensor, new: float) -> Tensor:
        """``known``, float32 ``[batch, heads, entries]``, with the value of a new entry for those stored since."""
        missing = self.held - known.shape[-1]
        if known.dim() > 1 and not missing:
            return known
        latest = torch.full((*self.keys.shape[:2], missing), float(new), device=self.keys.device)
        return latest if known.dim() == 1 else torch.cat([known, latest], -1)

    def extend(self, keys: Tensor, values: Tensor, read: int) -> None:
        """Store the entries of new tokens, which ``read`` tokens precede in the text."""
        if not self.is_initialized and all(t.untyped_storage().nbytes() == t.nbytes for t in (keys, values)):
            self.lazy_initialization(keys, values)  # their storage is not shared: a prompt is not copied
            self.replace(keys, values)
        elif self.ragged is not None:
            self.ragged.append(keys, values)
        else:
            self.append(keys, values, NO_HOLES)
        if self.subset is not None:
            self.subset.append(keys, values, NO_HOLES)
        self.read = read + keys.shape[-2]

    def present(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, entries, width]`` of all entries, unpacked."""
        if self.ragged is not None:
            return self.ragged.unpack()
        if not self.packed:
            return self.keys, self.values
        plain = int(self.keys.shape[-2])
        *first, last = self.packed
        keys, values = last.unpack(plain)
        if plain:
            keys[:, :, -plain:], values[:, :, -plain:] = self.keys, self.values
        if first:
            parts = [*(packed.unpack() for packed in first), (keys, values)]
            keys, values = (torch.cat(tensors, -2) for tensors in zip(*parts, strict=True))
        return keys, values

    def attended(self) -> tuple[Tensor, Tensor]:
        """Keys and values that are attended: those of the subset if there is one, otherwise of all entries."""
        return self.present() if self.subset is None else (self.subset.keys, self.subset.values)

    @property
    def attends(self) -> int:
        """Number of entries that are attended."""
        return self.held if self.subset is None else int(self.subset.keys.shape[-2])

    def seen(self) -> Tensor:
        """Positions of the entries that are attended, int64 ``[batch, heads, entries]``."""
        if self.subset is None:
            return self.positions
        since = self.attends - self._subset_positions.shape[-1]
        return torch.cat([self._subset_positions, self.positions[..., self.held - since :]], -1)

    def attend_only(self, entries: Tensor, context: int | None = None) -> None:
        """Attend only these entries (int64 ``[batch, heads, n]``) and new ones from now on; none are removed.

        Args:
            context: entries from this index on are attended as well; None for none.
        """
        if context is not None:
            after = torch.arange(context, self.held, device=entries.device)
            entries = torch.cat([entries, after.expand(*entries.shape[:2], -1)], -1)
        keys, values = self.present()
        self.subset = EvictingLayer()
        self.subset.append(gather_entries(keys, entries), gather_entries(values, entries), NO_HOLES)
        self._subset_positions = self.positions.gather(-1, entries)

    def choose(self, entries: Tensor, present: tuple[Tensor, Tensor], weights: Tensor | None = None) -> None:
        """Keep only these entries of ``present``; they are copied, so that the others are freed.

        Args:
            entries: int64 ``[batch, heads, kept]``, ascending; -1 in front if a head keeps fewer than another.
            present: keys and values of all entries, as they are to be stored.
            weights: how many tokens each of all entries stands for; None if each is one token.
        """
        keys, values = present
        positions, sums = self.positions, self.sums if self._sums.dim() > 1 else None
        at, none = entries.clamp(min=0), entries < 0
        self.packed, self._packed_entries, self.ragged = (), 0, None
        if bool(none.any()):
            self.ragged = Ragged.of(keys, values, entries)
            self.replace(keys[:, :, :0].clone(), values[:, :, :0].clone())
        else:
            self.replace(gather_entries(keys, at), gather_entries(values, at))
        self._positions = positions.gather(-1, at).masked_fill_(none, -1)
        if sums is not None:
            self._sums = sums.gather(-1, at).masked_fill_(none, 0)
        if weights is not None:
            self._weights = weights.gather(-1, at)

    def forget(self, count: int) -> None:
        """Drop the last ``count`` entries, as if their tokens had not been read; no entries may be packed yet."""
        positions, weights = self.positions[..., :-count], self.weights
        sums = self.sums if self._sums.dim() > 1 else None
        self.keep(torch.arange(self.held - count, device=self.keys.device))
        self._positions, self.read = positions, self.read - count
        if sums is not None:
            self._sums = sums[..., :-count].clone()
        if weights is not None:
            self._weights = weights[..., :-count].clone()

    def pack(self, packed: StoredEntries, count: int) -> None:
        """Replace the first ``count`` plain entries by ``packed``, which stores the same entries in another form."""
        self.packed = packed.after(self.packed)
        self._packed_entries += count
        self.replace(self.keys[:, :, count:].clone(), self.values[:, :, count:].clone())

    def tensors(self) -> list[Tensor]:
        copies = [] if self.subset is None else [self.subset.keys, self.subset.values]
        weights = [] if self.weights is None else [self.weights]
        return [self.keys, self.values, *self._packed_tensors(), *copies, *weights]

    def _packed_tensors(self) -> list[Tensor]:
        if self.ragged is not None:
            return self.ragged.tensors()
        return [tensor for packed in self.packed for tensor in packed.tensors()]

    def entry_bytes(self) -> int:
        """Bytes of one plain entry over all rows and heads."""
        return sum(t.element_size() * t.shape[0] * t.shape[1] * t.shape[-1] for t in (self.keys, self.values))

    def entries(self) -> float:
        """Entries held per row and head; packed ones count as their bytes in units of a plain entry."""
        if not self.packed and self.ragged is None:
            return self.held
        packed = self._packed_tensors()
        taken = sum(t.numel() * t.element_size() for t in packed)
        return float(self.keys.shape[-2]) + taken / self.entry_bytes()

    def entries_by_head(self) -> list[float]:
        """Entries of every head, the mean over rows; packed ones count as their bytes."""
        heads = int(self.keys.shape[1])
        if self.ragged is None:
            return [self.entries()] * heads
        counts = torch.tensor(self.ragged.counts, dtype=torch.float64).view(-1, heads)
        return [float(count) for count in counts.mean(0)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        def more(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(repeats, dim=0)

        self.packed = tuple(packed.repeated(repeats) for packed in self.packed)
        self.ragged = None if self.ragged is None else self.ragged.repeated(repeats)
        self._positions = more(self.positions)
        if self._sums.dim() > 1:
            self._sums = more(self.sums)
        if self.weights is not None:
            self._weights = more(self.weights)
        self.pending = [more(query) for query in self.pending]
        self.queries = None if self.queries is None else more(self.queries)
        if self.moments is not None:
            self.moments = self.moments[0], more(self.moments[1]), more(self.moments[2])
        self.carried = None if self.carried is None else more(self.carried)
        if self.subset is not None:
            self.subset.batch_repeat_interleave(repeats)
            self._subset_positions = more(self._subset_positions)
        super().batch_repeat_interleave(repeats)


class PolicyCache(EvictingCache):
    """A cache of :class:`PolicyLayer`.

    Attributes:
        read: text tokens read before the next forward pass.
        rerotated: how many of the first keys are re-rotated to their index in the cache, as in StreamingLLM; the
            others form a contiguous window and need not be.
        inv_freq: angle per position of each coordinate pair, by layer, for re-rotation; None for layers without.
        is_full_step: whether the next forward pass attends all entries, although layers have a subset (RefreshKV).
    """

    layers: list[PolicyLayer]

    def __init__(self, rerotated: int = 0, inv_freq: Sequence[Tensor | None] = ()) -> None:
        super().__init__()
        self.read, self.rerotated, self.inv_freq, self.is_full_step = 0, rerotated, inv_freq, False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a layer, and return those that it attends, re-rotated if ``rerotated`` is set.

        Raises:
            UserError: the model is called outside a session, under its own mask.
        """
        if OBSERVER.get() is None:
            raise UserError(
                f"{type(self).__name__} is filled by a PolicySession only: rows and heads "
                "hold different entries, which the model's own mask, left-padded batches, beams and generate() do "
                "not know.",
                "Open a session (kvbench.inference.opening), which reads texts of one length.",
            )
        while len(self.layers) <= layer_idx:
            self.layers.append(PolicyLayer())
        layer = self.layers[layer_idx]
        layer.extend(key_states, value_states, self.read)
        if layer.ragged is not None:  # attended head by head: see PolicySession.attend
            return key_states, value_states
        keys, values = layer.present() if self.is_full_step else layer.attended()
        return self.rerotate(layer_idx, keys), values

    def rerotate(self, number: int, keys: Tensor) -> Tensor:
        """The keys of a layer as they are attended: the first ones rotated as if nothing behind them was removed."""
        layer, inv_freq = self.layers[number], self.inv_freq[number] if self.inv_freq else None
        count, gap = min(self.rerotated, layer.held), layer.read - layer.held
        if not count or inv_freq is None or gap == 0:
            return keys
        # Only relative positions matter: moving the first keys on by the gap equals moving all other tokens back.
        # The stored keys are rotated anew each time, since rounding errors would add up.
        angle = (torch.arange(gap, gap + count, device=keys.device) - layer.positions[..., :count])[..., None]
        angle = angle * inv_freq.to(keys.device)
        first = rotated(keys[:, :, :count], angle.cos(), angle.sin())
        return torch.cat([first, keys[:, :, count:]], -2)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search is not supported.

        Raises:
            UserError: always.
        """
        raise UserError(f"{type(self).__name__} does not follow beams.", "Sample, or decode greedily.")

    def mean_entries(self) -> float:
        """Entries held per row and head, averaged over layers; packed ones count as their bytes."""
        return sum(layer.entries() for layer in self.layers) / max(1, len(self.layers))

    def mean_seen(self) -> float:
        """Entries that the next forward pass attends per row and head, averaged over layers."""
        found = [layer.entries() if layer.subset is None else layer.attends for layer in self.layers]
        return sum(found) / max(1, len(found))

    def most_entries(self) -> int:
        return max((layer.held for layer in self.layers), default=0)

    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    def entry_bytes(self) -> int:
        """Bytes of one plain entry over all layers, rows and heads."""
        return sum(layer.entry_bytes() for layer in self.layers)
