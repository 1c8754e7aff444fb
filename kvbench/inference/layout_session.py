"""The two executions of a layout: one masked pass, and a stream with entries really removed.

Both yield the logits of the *text* tokens only, in order; the sentinels that a layout inserts are
fed but never scored. A layout is shared by all rows of a batch, so eviction is aligned and no
padding is ever needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvbench.cache.evicting import ROOM, EvictingCache, Mixing
from kvbench.methods.layouts.layout import Layout
from kvbench.models.adapter import Adapter
from kvbench.models.rope import frequencies


class Scored(NamedTuple):
    """Logits ``[batch, stop - start, vocabulary]`` after the text tokens start .. stop - 1."""

    start: int
    stop: int
    logits: Tensor


@dataclass
class Trace:
    """What a streamed execution held.

    Attributes:
        held: entries in the cache now.
        peak: the most entries there ever were at once, the current chunk included.
    """

    held: int = 0
    peak: int = 0


@dataclass
class Flow:
    """A layout being fed.

    Attributes:
        evicts: dead entries are really removed; otherwise they are only masked.
        is_loose: a few dead entries may stay, masked, until new ones take their places; otherwise
            they leave at once.
        fed: slots fed so far.
        stored: int64, the slots that the cache holds, by place.
        holes: int64, the places of dead ones.
    """

    layout: Layout
    cache: EvictingCache
    evicts: bool = True
    is_loose: bool = False
    fed: int = 0
    stored: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    holes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def place(self, slots: Tensor) -> Tensor:
        """Say where the coming slots go, holes first, and return the slots that are then present, by place."""
        if not self.is_loose or not self.evicts:
            self.cache.holes = None
            return torch.cat([self.stored, slots])
        taken = self.holes[: len(slots)]
        layers = self.cache.layers
        self.cache.holes = _sent(taken, layers[0].keys.device) if layers else taken  # once, not in every layer
        present = torch.cat([self.stored, slots[len(taken) :]])
        present[taken] = slots[: len(taken)]
        return present

    def settle(self, present: Tensor) -> int:
        """Let go of what no later slot may see, once ``fed`` slots have been fed; returns what is held."""
        alive = self.layout.last_query[present] >= self.fed
        held = int(alive.sum())
        # Entries that are mixed from others are looked up by place, in order: there, nothing may linger or move.
        may_move = self.is_loose and self.layout.mixture is None
        if self.evicts and len(present) - held > (held // ROOM if may_move else 0):
            device = self.cache.layers[0].keys.device
            if may_move:
                last, holes = torch.nonzero(alive[held:]).flatten() + held, torch.nonzero(~alive[:held]).flatten()
                self.cache.compact(_sent(last, device), _sent(holes, device), held)
                present[holes] = present[last]
                present, alive = present[:held], alive.new_ones(held)
            else:
                keep = torch.nonzero(alive).flatten()
                self.cache.keep(_sent(keep, device))
                present, alive = present[keep], alive[keep]
        self.stored, self.holes = present, torch.nonzero(~alive).flatten()
        return held

    def resume(self, fed: int, cache: EvictingCache) -> None:
        """Go on as if ``fed`` slots had been fed and ``cache`` held what is left of them, in order."""
        self.cache, self.fed = cache, fed
        self.stored = self.layout.held_after(fed) if self.evicts else torch.arange(fed)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for what the device is doing."""
    return tensor.to(device, non_blocking=True)


@dataclass
class Reader:
    """Feeds text under a layout to a model, with the method's adapter if it has one.

    Attributes:
        beside: entered around all that a step does outside the model's own forward pass, so that it
            can be timed.
    """

    model: nn.Module
    adapter: Adapter | None = None
    trace: Trace = field(default_factory=Trace)
    beside: Callable[[], AbstractContextManager[object]] = nullcontext

    @contextmanager
    def ready(self) -> Iterator[Reader]:
        """The model with the adapter applied."""
        with ExitStack() as stack:
            if self.adapter is not None:
                stack.enter_context(self.adapter.applied(self.model))
            yield self

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The base model again, inside ``ready``, for the length of the block."""
        if self.adapter is None:
            yield
            return
        with self.adapter.closed(self.model):
            yield

    def inputs(self, ids: Tensor, layout: Layout, slots: slice = slice(None)) -> Tensor:
        """What is fed of text ``[batch, n]`` under a layout: ids, or embeddings where an adapter has rows of its own.

        Text is fed by its ids, since some models take more from them than embeddings (tables by layer, routes).

        Args:
            slots: which of the fed sequence; the text among them must be in ``ids``.

        Returns:
            int64 ``[batch, slots]``, or embeddings ``[batch, slots, width]``.
        """
        source = _sent(layout.source[slots], ids.device)
        text = ids[:, source.clamp(max=ids.shape[1] - 1)]
        if self.adapter is None or len(layout) == layout.n_raw:
            return text  # any other tokens are addresses, and nothing that is computed at them is read
        embedded: Tensor = self.model.get_input_embeddings()(text)  # type: ignore[operator]
        special = self.adapter.rows.to(embedded.dtype)[(source - layout.n_raw).clamp(min=0)]
        return torch.where((source < layout.n_raw)[:, None], embedded, special)

    def one_pass(
        self, ids: Tensor, layout: Layout, keep: slice = slice(None), cache: EvictingCache | None = None
    ) -> Tensor:
        """Logits ``[batch, kept, vocabulary]`` of the text tokens ``keep`` under the mask."""
        device = ids.device
        self._open_gate(layout.special_slots.to(device))
        if layout.mixture is not None:
            cache = EvictingCache() if cache is None else cache
            cache.mixing = self._mixing(layout, 0, torch.arange(len(layout)), device)
        mask = None if layout.is_plain else layout.mask[None, None].to(device)
        return self._forward(
            self.inputs(ids, layout), mask, layout.position.to(device),
            layout.read_slots[keep].to(device), cache, 0,
        )

    def stream(
        self, ids: Tensor, layout: Layout, cache: EvictingCache, chunk: int, first: int = 0
    ) -> Iterator[Scored]:
        """Feed ``chunk`` tokens at a time; dead entries leave the cache after each chunk.

        Args:
            first: text token from which on logits are wanted; before it none are computed.
        """
        inputs, flow = self.inputs(ids, layout), Flow(layout, cache)
        wanted = layout.read_slots[first:]
        token = first
        for start in range(0, len(layout), chunk):
            stop = min(start + chunk, len(layout))
            text = wanted[(wanted >= start) & (wanted < stop)]
            logits = self.feed(inputs[:, start:stop], flow, text)
            if len(text):
                yield Scored(token, token + len(text), logits)
                token += len(text)

    def feed(self, inputs: Tensor, flow: Flow, wanted: Tensor) -> Tensor:
        """Feed the next slots of a layout; dead entries leave the cache afterwards.

        Args:
            inputs: ids ``[batch, m]`` or embeddings ``[batch, m, width]`` of the slots from ``flow.fed`` on.
            wanted: int64, the slots among them whose logits are wanted.

        Returns:
            Logits ``[batch, wanted, vocabulary]``.
        """
        device, layout = inputs.device, flow.layout
        start, stop = flow.fed, flow.fed + inputs.shape[1]
        fed = torch.arange(start, stop)
        with self.beside():
            present = flow.place(fed)
            special = layout.special_slots
            inside = special[(special >= start) & (special < stop)] - start
            self._open_gate(_sent(inside, device))
            flow.cache.mixing = self._mixing(layout, start, present, device)
            mask = self._mask(layout, fed, present)
        logits = self._forward(
            inputs, None if mask is None else _sent(mask[None, None], device),
            _sent(layout.position[start:stop], device), _sent(wanted - start, device), flow.cache,
            int(layout.position[start]),
        )
        with self.beside():
            self.trace.peak = max(self.trace.peak, len(present))
            flow.fed = stop
            self.trace.held = flow.settle(present)
        return logits

    @staticmethod
    def _mask(layout: Layout, fed: Tensor, present: Tensor) -> Tensor | None:
        """bool ``[fed, present]``; None where the kernel's own causal rule says the same."""
        if layout.is_plain and (len(fed) == 1 or len(fed) == len(present)):
            return None
        mask = layout.visible(fed, present)
        return None if len(fed) == 1 and bool(mask.all()) else mask

    def go_on(self, ids: Tensor, position: int, cache: EvictingCache) -> Tensor:
        """Feed text ``[batch, m]`` after a compressed context, without further compression.

        Args:
            position: position id of the first of these tokens.

        Returns:
            Logits ``[batch, m, vocabulary]``.
        """
        held, m = cache.entries(), ids.shape[1]
        mask = torch.ones(m, held + m, dtype=torch.bool).tril(held)[None, None].to(ids.device)
        self._open_gate(torch.empty(0, dtype=torch.long, device=ids.device))
        cache.mixing = None
        self.trace.peak = max(self.trace.peak, held + m)
        places = torch.arange(position, position + m, device=ids.device)
        return self._forward(ids, mask, places, torch.arange(m, device=ids.device), cache, position)

    def _mixing(self, layout: Layout, first: int, present: Tensor, device: torch.device) -> Mixing | None:
        """What the forward pass of the slots from ``first`` on has to mix, given what is present."""
        mixture = layout.mixture
        if mixture is None:
            return None
        places, weights = mixture.among(first, present)
        if len(places) == 0:
            return None
        turns: tuple[tuple[Tensor, Tensor] | None, ...] = ()
        speeds = None
        if mixture.unrotated:
            with self.bare():  # asked as it is
                speeds = frequencies(self.model)
        if speeds is not None:
            position = _sent(layout.position[present], device)[:, None]
            known = {id(speed): position * _sent(speed, device) for speed in speeds if speed is not None}
            turned = {key: (angles.cos(), angles.sin()) for key, angles in known.items()}
            turns = tuple(turned.get(id(speed)) for speed in speeds)
        return Mixing(_sent(places, device), _sent(weights, device), turns)

    def _open_gate(self, special: Tensor) -> None:
        if self.adapter is not None:
            self.adapter.open_gate(special)

    def _forward(
        self, inputs: Tensor, mask: Tensor | None, position: Tensor, keep: Tensor,
        cache: EvictingCache | None, begin: int,
    ) -> Tensor:
        extra: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if cache is not None:
            cache.begin = begin
        extra["inputs_embeds" if inputs.is_floating_point() else "input_ids"] = inputs
        out = self.model(
            attention_mask=mask, position_ids=position[None],
            use_cache=cache is not None, logits_to_keep=keep, **extra,
        )
        logits: Tensor = out.logits
        return logits
