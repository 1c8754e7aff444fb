"""Sessions of HOMER: chunks of a context are read side by side, and thinned and merged in pairs between layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache.evicting import EvictingCache
from kvbench.errors import UserError
from kvbench.inference.filling import random_entries
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.reader import Reader
from kvbench.inference.session import Scored
from kvbench.methods.layouts.layout import Layout, plain_tokens, sees_everything
from kvbench.methods.prefixes.homer import Homer, MergePlan
from kvbench.models.attention_hooks import OBSERVER


@dataclass
class _Merging:
    """One pass over the chunks of a context; the observer of its attention.

    Attributes:
        cache: keys and values ``[rows x chunks, heads, tokens, width]`` of the layers so far.
        position: int64 ``[rows x chunks, tokens]``, the positions of the tokens that are left.
        scores: ``[rows x chunks, tokens]``, of the layer before a merge.
        rotations: cosine and sine ``[rows x chunks, tokens, width]`` of the tokens that are left; empty before a
            merge, or if the model hands none to its layers.
    """

    plan: MergePlan
    cache: EvictingCache
    position: Tensor
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    rotations: tuple[Tensor, ...] = ()

    def mask(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        return None

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        return None

    def observe(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """Score the tokens of every chunk by the last one, in the layer before a merge."""
        if layer + 1 in self.plan.levels:
            last = query[:, :, -1:].float()
            last = last.view(len(last), keys.shape[1], -1, 1, last.shape[-1])  # [chunks, heads, group, 1, width]
            self.scores = (last @ keys.float()[:, :, None].transpose(-1, -2)).amax((1, 2, 3)) * scaling

    def merge(self, hidden: Tensor) -> Tensor:
        """Thin all chunks and merge them in pairs: hidden states ``[chunks, tokens, width]``, and in place positions,
        rotations and the entries of the layers below."""
        plan, text = self.plan, slice(self.plan.sinks, self.scores.shape[1] - self.plan.suffix)
        ranked = self.scores[:, text].argsort(dim=1, descending=True, stable=True)
        count = plan.held - plan.held // 2  # the left one of a pair keeps the odd token
        left = ranked[0::2, :count].sort(dim=1).values + plan.sinks
        right = ranked[1::2, : plan.held // 2].sort(dim=1).values + plan.sinks

        def merged(x: Tensor) -> Tensor:
            first, second = x[0::2], x[1::2]
            affixes = (first.float() + second.float()).to(x.dtype) / 2 if x.is_floating_point() else first
            return torch.cat([
                affixes[:, : plan.sinks], _taken(first, left), _taken(second, right),
                affixes[:, x.shape[1] - plan.suffix :],
            ], 1)

        for layer in self.cache.layers:
            layer.replace(*(merged(one.transpose(1, 2)).transpose(1, 2) for one in (layer.keys, layer.values)))
        self.position = merged(self.position)
        self.rotations = tuple(merged(one) for one in self.rotations)
        return merged(hidden)


def _taken(x: Tensor, which: Tensor) -> Tensor:
    """The tokens ``[chunks, m]`` of each chunk of ``x`` ``[chunks, tokens, ...]``."""
    return x[torch.arange(len(x), device=x.device)[:, None], which]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, in order: the longest list of modules that have an attention each.

    Raises:
        UserError: they are not found.
    """
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [one for one in lists if all(any(hasattr(m, "layer_idx") for m in layer.modules()) for layer in one)]
    if not found:
        raise UserError(f"The layers of {type(model).__name__} are not a list: homer cannot merge between them.")
    return max(found, key=len)


@dataclass
class HomerSession(LayoutSession):
    """Reads a context in merged chunks; what follows is read behind it, and nothing of that is removed.

    Attributes:
        plan: how the context is cut and merged.
    """

    plan: MergePlan = field(kw_only=True)

    @classmethod
    def opened(cls, reader: Reader, method: Homer, context: int, layers: int) -> HomerSession:
        plan = method.plan(context, layers)
        whole = Layout(
            plain_tokens(context), torch.arange(context), sees_everything, context, next_position=plan.positions
        )
        return cls(reader, whole, context, plan=plan)

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        if first < self.context - 1:
            raise UserError(
                "homer compresses a context for what follows it, and cannot score the context itself.",
                "Use --protocol prefix, or a task with questions.",
            )
        plan, layers = self.plan, decoder_layers(self.reader.model)
        parts, rows = self._chunks(ids), len(ids)
        device, cache = ids.device, EvictingCache()
        position = torch.arange(plan.positions, device=device)
        merging = _Merging(plan, cache, position.expand(len(parts), -1))
        self.peak = plan.positions * (2 ** len(plan.levels))
        token = OBSERVER.set(merging)
        try:
            with ExitStack() as stack:
                for number in range(plan.levels[0] if plan.levels else len(layers), len(layers)):
                    before = _before(merging, number in plan.levels)
                    stack.callback(layers[number].register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layers[-1].register_forward_hook(_as_fed(parts)).remove)
                every = torch.ones(1, 1, parts.shape[1], 1, dtype=torch.bool, device=device)
                out = self.reader.model(
                    input_ids=parts, position_ids=position[None], past_key_values=cache, use_cache=True,
                    attention_mask=every, logits_to_keep=1,
                )
        finally:
            OBSERVER.reset(token)
        self._take((layer.keys, layer.values) for layer in cache.layers)
        self.removals = len(plan.levels)
        if first < self.context:
            yield Scored(self.context - 1, self.context, out.logits[:rows])

    def _chunks(self, ids: Tensor) -> Tensor:
        """Ids ``[rows x chunks, tokens]`` of the chunks, each between sinks and suffix."""
        plan, count = self.plan, 2 ** len(self.plan.levels)
        rows = len(ids)
        text = ids[:, plan.sinks : plan.sinks + plan.chunk * count].reshape(rows, count, plan.chunk)
        before = ids[:, None, : plan.sinks].expand(-1, count, -1)
        behind = ids[:, None, ids.shape[1] - plan.suffix :].expand(-1, count, -1)
        return torch.cat([before, text, behind], 2).flatten(0, 1)

    def _take(self, entries: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Hold these entries, of every layer, as those of the context."""
        peak = self.peak
        self._hold(torch.arange(self.plan.entries), entries)
        self.peak = max(peak, self.plan.entries)

    def fill(self, batch: int, seed: int) -> None:
        self._take(random_entries(self.reader.model, batch, self.plan.entries, seed))

    def step(self, ids: Tensor) -> Tensor:
        (found,) = self.extend(ids[:, None])
        return found.logits[:, -1]

    def held_positions(self) -> list[Tensor] | None:
        return None

    def visible(self, queries: Tensor) -> Tensor:
        return self.plan.entries + queries - self.context


def _before(merging: _Merging, merges: bool) -> Any:
    """A hook before a layer that gives it the tokens that are left, merged in pairs if it is the first of a level."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        changed = dict(kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if merges:
            if not merging.rotations and kwargs.get("position_embeddings") is not None:
                merging.rotations = tuple(one.expand(len(hidden), -1, -1) for one in kwargs["position_embeddings"])
            hidden = merging.merge(hidden)
        if merging.rotations:
            changed["position_embeddings"] = merging.rotations
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = merging.position
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    return hook


def _as_fed(parts: Tensor) -> Any:
    """A hook behind the last layer that gives the states of the last token in the shape of what was fed, which some
    models insist on: those of the rows first."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        copies = len(parts) // len(hidden)
        states = hidden[:, -1:].repeat(copies, parts.shape[1], 1)
        return (states, *out[1:]) if isinstance(out, tuple) else states

    return hook
