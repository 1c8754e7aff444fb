"""Feeds text to a model under a layout, with the method's adapter if it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache.evicting import EvictingCache, MergeStep
from kvbench.errors import UserError
from kvbench.methods.layouts.layout import Layout
from kvbench.methods.memories.writer import State, Writer
from kvbench.models.adapter import Adapter
from kvbench.models.rope import inv_freq_by_layer


@dataclass
class Reader:
    """Feeds text under a layout to a model.

    Logits are those of the *text* tokens only, in order; special tokens of a layout are fed and not scored.

    Attributes:
        overhead: context manager entered around all work outside the model's own forward pass, so that it can be timed.
    """

    model: nn.Module
    adapter: Adapter | None = None
    overhead: Callable[[], AbstractContextManager[object]] = nullcontext

    @contextmanager
    def ready(self) -> Iterator[Reader]:
        """Apply the adapter to the model within the block."""
        with ExitStack() as stack:
            if self.adapter is not None:
                stack.enter_context(self.adapter.applied(self.model))
            yield self

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Use the base model without its adapter within the block, inside ``ready``."""
        if self.adapter is None:
            yield
            return
        with self.adapter.closed(self.model):
            yield

    def inputs(
        self, ids: Tensor, layout: Layout, slots: slice = slice(None), special: Tensor | None = None
    ) -> Tensor:
        """Model inputs for text ``[batch, n]`` under a layout: ids, or embeddings if an adapter adds special tokens.

        Plain text is fed as ids, since some models need ids for more than embeddings (tables per layer, routing).

        Args:
            slots: which part of the input sequence; its text tokens must be in ``ids``.
            special: ``[batch, slots, width]``, what is fed at special tokens; None for the adapter's rows.

        Returns:
            int64 ``[batch, slots]``, or embeddings ``[batch, slots, width]``.
        """
        source = layout.source[slots]
        is_text = bool((source < layout.n_raw).all())
        source = to_device(source, ids.device)
        text = ids[:, source.clamp(max=ids.shape[1] - 1)]
        if self.adapter is None or is_text:
            return text  # without an adapter, special tokens only hold merged entries: their ids do not matter
        embedded: Tensor = self.model.get_input_embeddings()(text)  # type: ignore[operator]
        if special is None:
            special = self.adapter.rows[(source - layout.n_raw).clamp(min=0)]
        return torch.where((source < layout.n_raw)[:, None], embedded, special.to(embedded.dtype))

    def generated_inputs(
        self, ids: Tensor, layout: Layout, slots: slice, special: Tensor | None = None
    ) -> Tensor:
        """Model inputs for generated tokens ``[rows, 1]``: the token, and the special tokens after it.

        Special tokens are embeddings if an adapter has trained them; those that only hold merged entries are arbitrary
        ids. ``special`` as for :meth:`inputs`.
        """
        count = slots.stop - slots.start
        if count == 1:
            return ids
        if self.adapter is None:
            return ids.expand(-1, count)
        row = layout.tokens.row[slots].to(ids.device, non_blocking=True)
        text: Tensor = self.model.get_input_embeddings()(ids)  # type: ignore[operator]
        if special is None:
            special = self.adapter.rows[row.clamp(min=0)].expand(len(ids), -1, -1)
        return torch.where((row < 0)[None, :, None], text, special.to(text.dtype))

    def begin(self, batch: int) -> State:
        """The state of the adapter's writer before any text."""
        return self._writing()[1].begin(batch)

    def write(self, ids: Tensor, chunks: Sequence[int], state: State) -> tuple[Tensor, State]:
        """Write the memory of consecutive chunks of text ``[batch, n]``: rows ``[batch, k x chunks, width]``, and the
        writer's new state."""
        adapter, writer = self._writing()
        with adapter.opened():
            return writer.write_all(self.model, ids, chunks, state)

    def _writing(self) -> tuple[Adapter, Writer]:
        if self.adapter is None or not isinstance(self.adapter.writer, Writer):
            raise UserError("Memory that is computed from text needs an adapter with a writer.", "Give its folder.")
        return self.adapter, self.adapter.writer

    def one_pass(
        self, ids: Tensor, layout: Layout, keep: slice = slice(None), cache: EvictingCache | None = None,
        special: Tensor | None = None,
    ) -> Tensor:
        """One pass under the layout's mask: logits ``[batch, kept, vocabulary]`` of the text tokens ``keep``.

        Args:
            special: ``[batch, slots, width]``, what is fed at special tokens; None for the adapter's rows, or what its
                writer makes.
        """
        device = ids.device
        if layout.written and special is None:
            rows, _ = self.write(ids, layout.written, self.begin(len(ids)))
            special = rows[:, layout.tokens.row.clamp(min=0).to(device)]
        self.open_gate(layout.special_slots.to(device))
        if layout.merge_plan is not None:
            cache = EvictingCache() if cache is None else cache
            cache.merge_step = self.merge_step(layout, 0, torch.arange(len(layout)), device)
        mask = None if layout.is_plain else layout.biased(layout.mask, torch.arange(len(layout)))[None, None].to(device)
        return self.forward(
            self.inputs(ids, layout, special=special), mask, layout.position.to(device),
            layout.read_slots[keep].to(device), cache, 0,
        )

    def merge_step(self, layout: Layout, first: int, present: Tensor, device: torch.device) -> MergeStep | None:
        """The merges to apply when the slots from ``first`` on are fed, given the slots ``present`` in the cache."""
        merge_plan = layout.merge_plan
        if merge_plan is None:
            return None
        places, weights = merge_plan.among(first, present)
        if len(places) == 0:
            return None
        rotations: tuple[tuple[Tensor, Tensor] | None, ...] = ()
        inv_freq = None
        if merge_plan.unrotated:
            with self.without_adapter():  # found out on the base model
                inv_freq = inv_freq_by_layer(self.model)
        if inv_freq is not None:
            position = to_device(layout.position[present], device)[:, None]
            angles = {id(one): position * to_device(one, device) for one in inv_freq if one is not None}
            known = {key: (angle.cos(), angle.sin()) for key, angle in angles.items()}
            rotations = tuple(known.get(id(one)) for one in inv_freq)
        return MergeStep(to_device(places, device), to_device(weights, device), rotations)

    def open_gate(self, special: Tensor) -> None:
        """Tell the adapter which of the next inputs are special tokens."""
        if self.adapter is not None:
            self.adapter.open_gate(special)

    def forward(
        self, inputs: Tensor, mask: Tensor | None, position: Tensor, keep: Tensor,
        cache: EvictingCache | None, begin: int,
    ) -> Tensor:
        """Logits ``[batch, keep, vocabulary]`` of ids or embeddings, fed at their positions.

        Args:
            begin: position of the first of them.
        """
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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy the tensor to the device without synchronising with it."""
    return tensor.to(device, non_blocking=True)
