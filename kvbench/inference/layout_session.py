"""Sessions of layout methods: the streamed execution, which removes entries, and one masked pass.

All rows of a batch share a layout, so eviction is aligned and no padding is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.cache.evicting import ROOM, EvictingCache
from kvbench.cache.shape import whole_entry_bytes
from kvbench.errors import UserError
from kvbench.inference.filling import random_entries
from kvbench.inference.reader import Reader, to_device
from kvbench.inference.session import CacheBytes, Scored
from kvbench.methods.layouts.layout import OPEN, Layout


@dataclass
class LayoutSession:
    """Feeds a batch under a layout and removes the entries that no later token may see.

    A forward pass is prepared by ``begin``, accounted for by ``end`` and followed by ``settle``, so that one pass can
    serve several sessions (:mod:`kvbench.inference.together`).

    Attributes:
        context: number of text tokens that are read first; the rest of the layout is generated, or read one by one.
        chunk: number of slots that are fed at a time.
        evicts: whether dead entries are removed; otherwise they are only masked.
        is_loose: whether a few dead entries may stay, masked, until new ones overwrite them, as while text is written;
            otherwise they are removed at once.
        is_kept_whole: whether the text being read comes after the layout's, and is kept.
        fed: number of slots fed so far; ``read``: number of text tokens.
        stored: int64, the slots that the cache holds, by cache index.
        holes: int64, the cache indices of dead entries.
        present: int64, the slots stored and being fed, by cache index.
        shown: bool ``[1, 1, fed, present]``, what the slots being fed attend to; None where the kernel's own causal
            mask is equivalent.
        kept, peak, removals: see :class:`kvbench.inference.session.Session`.
    """

    reader: Reader
    layout: Layout
    context: int
    chunk: int = 64
    evicts: bool = True
    cache: EvictingCache = field(default_factory=EvictingCache)
    is_loose: bool = False
    is_kept_whole: bool = False
    fed: int = 0
    read: int = 0
    kept: int = 0
    peak: int = 0
    removals: int = 0
    stored: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    holes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    present: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    shown: Tensor | None = None

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        """Feed ``chunk`` slots at a time and remove dead entries after each chunk; ``ahead`` is ignored."""
        end, token = self._stop(self.context - 1), first
        wanted = self.layout.read_slots[first : self.context]
        for start in range(0, end, self.chunk):
            stop = min(start + self.chunk, end)
            text = wanted[(wanted >= start) & (wanted < stop)]
            logits = self.feed(self.inputs(ids, slice(start, stop)), text)
            if len(text):
                yield Scored(token, token + len(text), logits)
                token += len(text)

    def extend(self, ids: Tensor) -> Iterator[Scored]:
        """Feed text without further compression."""
        count = ids.shape[1]
        if count:
            with self.kept_whole():
                yield Scored(0, count, self._forward(ids, torch.arange(count)))

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        """Within the block, text after the layout's is read: no entries of it will be removed."""
        self.is_kept_whole = True
        try:
            yield
        finally:
            self.is_kept_whole = False

    def expand(self, copies: int) -> None:
        self.cache.batch_repeat_interleave(copies)

    def step(self, ids: Tensor) -> Tensor:
        """Feed one token per row, and the special tokens up to the next text token."""
        stop, wanted = self._stop(self.read), self.layout.read_slots[self.read : self.read + 1]
        return self.feed(self.generated_inputs(ids[:, None], slice(self.fed, stop)), wanted)[:, 0]

    def inputs(self, ids: Tensor, slots: slice) -> Tensor:
        """Model inputs for these slots; ``ids`` are all of the text ``[batch, n]``."""
        return self.reader.inputs(ids, self.layout, slots)

    def generated_inputs(self, ids: Tensor, slots: slice) -> Tensor:
        """Model inputs for these slots, the first of which is a generated token ``[rows, 1]``."""
        return self.reader.generated_inputs(ids, self.layout, slots)

    def fill(self, batch: int, seed: int) -> None:
        fed = self._stop(self.context - 1)
        held = self.layout.held_after(fed) if self.evicts else torch.arange(fed)
        self._hold(held, random_entries(self.reader.model, batch, len(held), seed))

    def take_over(self, entries: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Go on from keys and values ``[batch, KV heads, context, width]`` of every layer that another session has
        read; the layout must be plain."""
        self._hold(torch.arange(self.context), entries)

    def _hold(self, slots: Tensor, entries: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Begin behind the context, with the entries of these slots."""
        self.fed, self.read = self._stop(self.context - 1), self.context
        self.stored, self.holes = slots, torch.empty(0, dtype=torch.long)
        self.kept = self.peak = len(slots)
        self.cache = EvictingCache()
        for place, (keys, values) in enumerate(entries):
            self.cache.update(keys, values, place)

    @property
    def device(self) -> torch.device:
        return next(self.reader.model.parameters()).device

    @property
    def attended(self) -> int:
        return self.cache.entries()

    def entries_by_head(self) -> list[list[float]]:
        return [[float(self.kept)] * int(layer.keys.shape[1]) for layer in self.cache.layers]

    def held_positions(self) -> list[Tensor] | None:
        layout = self.layout
        if len(layout.special_slots) or layout.merge_plan is not None:
            return None
        alive = torch.ones(len(self.stored), dtype=torch.bool)
        alive[self.holes] = False
        held = layout.tokens.raw[self.stored[alive]]
        return [held.expand(*layer.keys.shape[:2], -1) for layer in self.cache.layers]

    def bytes(self) -> CacheBytes:
        per_entry = self.cache.entry_bytes()
        whole = self.context * whole_entry_bytes(self.reader.model, per_entry)
        return CacheBytes(self.kept * per_entry, self.cache.physical_bytes(), whole)

    def tensors(self) -> list[Tensor]:
        return self.cache.tensors()

    def visible(self, queries: Tensor) -> Tensor:
        n = self.layout.n_raw
        after = len(self.layout.held_after(len(self.layout))) + queries - n
        return torch.where(queries < n, self.layout.visible_before[queries.clamp(max=n - 1)], after)

    def distance(self, targets: Tensor) -> Tensor | None:
        return self.layout.since_boundary(targets)

    def feed(self, inputs: Tensor, wanted: Tensor) -> Tensor:
        """Feed the next slots of the layout, and remove dead entries afterwards.

        Args:
            inputs: ids ``[batch, m]`` or embeddings ``[batch, m, width]`` of the slots from ``fed`` on.
            wanted: int64, the slots among them whose logits are returned.

        Returns:
            Logits ``[batch, wanted, vocabulary]``.
        """
        logits = self._forward(inputs, wanted - self.fed)
        self.settle()
        return logits

    def _forward(self, inputs: Tensor, keep: Tensor) -> Tensor:
        places = self.begin(inputs.shape[1])
        logits = self.reader.forward(
            inputs, self.shown, to_device(places, inputs.device), to_device(keep, inputs.device), self.cache,
            int(places[0]),
        )
        self.end(inputs.shape[1])
        return logits

    def begin(self, count: int) -> Tensor:
        """Prepare for a forward pass over the next ``count`` slots, and return their positions, int64 ``[count]``."""
        device, layout, reader = self.device, self.layout, self.reader
        start, stop = self.fed, self.fed + count
        with reader.overhead():
            if self.is_kept_whole:
                none = torch.empty(0, dtype=torch.long, device=device)
                # One by one there is spare room, so that the cache is not copied for each of them.
                self.cache.holes, self.cache.merge_step = none if count == 1 else None, None
                reader.open_gate(none)
                held = self.cache.entries()
                mask = None if count == 1 else torch.ones(count, held + count, dtype=torch.bool).tril(held)
            else:
                if start >= len(layout):
                    raise UserError(
                        f"The layout was planned for {layout.n_raw} tokens, and more follow.",
                        "Remove entries of the prompt only, or read the whole text in one call.",
                    )
                fed = torch.arange(start, stop)
                self.is_loose = start >= self._stop(self.context - 1)
                self.present = self._place(fed)
                special = layout.special_slots
                inside = special[(special >= start) & (special < stop)] - start
                reader.open_gate(to_device(inside, device))
                self.cache.merge_step = reader.merge_step(layout, start, self.present, device)
                mask = self._mask(fed, self.present)
            self.shown = None if mask is None else to_device(mask[None, None], device)
        return layout.text_positions(self.read, count) if self.is_kept_whole else layout.position[start:stop]

    def end(self, count: int) -> None:
        """Account for ``count`` slots that have been fed."""
        if self.is_kept_whole:
            self.read, self.kept = self.read + count, self.kept + count
            self.peak = max(self.peak, self.cache.entries())
            return
        self.fed += count
        self.read = int(torch.searchsorted(self.layout.raw_slots, self.fed))
        self.peak = max(self.peak, len(self.present))

    def settle(self) -> None:
        """Remove the entries that no later slot may see."""
        with self.reader.overhead():
            self._settle(self.present)

    def patched(self) -> AbstractContextManager[None]:
        """Nothing: a layout leaves what the model computes as it is."""
        return nullcontext()

    def mask(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        return self.shown

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        return None

    def observe(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """Nothing: a layout does not depend on what is attended to."""

    def _stop(self, token: int) -> int:
        """One past the last slot fed along with a text token; opening sentinels are fed with the text after them."""
        raw, kind = self.layout.raw_slots, self.layout.tokens.kind
        if token + 1 >= len(raw):
            return len(self.layout)
        stop = int(raw[token + 1])
        while int(kind[stop - 1]) == OPEN:
            stop -= 1
        return stop

    def _place(self, slots: Tensor) -> Tensor:
        """Assign cache indices to the next slots, holes first, and return the slots then present, by cache index."""
        if not self.is_loose or not self.evicts:
            self.cache.holes = None
            return torch.cat([self.stored, slots])
        taken = self.holes[: len(slots)]
        layers = self.cache.layers
        self.cache.holes = to_device(taken, layers[0].keys.device) if layers else taken  # copied once for all layers
        present = torch.cat([self.stored, slots[len(taken) :]])
        present[taken] = slots[: len(taken)]
        return present

    def _mask(self, fed: Tensor, present: Tensor) -> Tensor | None:
        """Attention mask ``[fed, present]`` as :meth:`Layout.biased` gives it; None where the kernel's own causal mask
        is equivalent."""
        if self.layout.is_plain and (len(fed) == 1 or len(fed) == len(present)):
            return None
        mask = self.layout.visible(fed, present)
        if len(fed) == 1 and self.layout.bias is None and bool(mask.all()):
            return None
        return self.layout.biased(mask, present)

    def _settle(self, present: Tensor) -> None:
        """Remove the entries that no later slot may see, after ``fed`` slots have been fed."""
        alive = self.layout.last_query[present] >= self.fed
        held = int(alive.sum())
        # Merging looks entries up by their order in the cache: there, dead entries may not stay and none may move.
        may_move = self.is_loose and self.layout.merge_plan is None
        if self.evicts and len(present) - held > (held // ROOM if may_move else 0):
            device = self.cache.layers[0].keys.device
            self.removals += 1
            if may_move:
                last, holes = torch.nonzero(alive[held:]).flatten() + held, torch.nonzero(~alive[:held]).flatten()
                self.cache.compact(to_device(last, device), to_device(holes, device), held)
                present[holes] = present[last]
                present, alive = present[:held], alive.new_ones(held)
            else:
                keep = torch.nonzero(alive).flatten()
                self.cache.keep(to_device(keep, device))
                present, alive = present[keep], alive[keep]
        self.stored, self.holes, self.kept = present, torch.nonzero(~alive).flatten(), held


@dataclass
class MaskedSession(LayoutSession):
    """One masked pass over the context; entries are removed only before more text follows."""

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        first = max(min(first, self.context), self.layout.unread)
        logits = self.reader.one_pass(ids, self.layout, slice(first, None), self.cache, self.special(ids))
        self.kept, self.peak = len(self.layout.held_after(len(self.layout))), len(self.layout)
        self.read = self.context
        yield Scored(first, self.context, logits)

    def special(self, ids: Tensor) -> Tensor | None:
        """What is fed at special tokens ``[batch, slots, width]``; None for the adapter's rows."""
        return None

    def extend(self, ids: Tensor) -> Iterator[Scored]:
        if ids.shape[1] and self.read == self.context:
            self.cache.keep(self.layout.held_after(len(self.layout)).to(ids.device))
        yield from super().extend(ids)
