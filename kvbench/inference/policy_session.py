"""Sessions of policies: tokens attend first, entries are removed afterwards.

Layers and heads hold different entries, so every layer attends under its own mask (all entries that it holds,
causally). The choices can be recorded, so that one masked pass can check that it gives the same logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kvbench.cache.policy_cache import PolicyCache, PolicyLayer
from kvbench.cache.shape import cache_shape, whole_entry_bytes
from kvbench.inference.attention_statistics import QUERIES_AT_ONCE, received_attention, with_moments, with_queries
from kvbench.inference.filling import random_entries
from kvbench.inference.session import CacheBytes, Scored
from kvbench.methods.policies.policy import CachePolicy, LayerView, Merged
from kvbench.models.attention_hooks import OBSERVER
from kvbench.models.configuration import text_config
from kvbench.models.rope import inv_freq_by_layer

_ALL = slice(None)
"""All tokens that are fed."""


@dataclass
class PolicySession:
    """A batch of texts that is read under a policy; every batch needs a new session.

    Attributes:
        total: number of text tokens in the context, which budgets refer to.
        row_seeds: for each row a number that depends on its text only.
        chunk: number of tokens fed at a time if entries are removed only at the end of the context; None if they are
            removed while it is read.
        seen: for every token read, how many earlier entries it attended to (the mean over layers).
        peak: the most entries that a layer has held.
        history: if a list is given, it records for every run of tokens fed what each layer attended to: positions
            ``[batch, heads, entries]``, -1 for none.
        overhead: context manager entered around all work outside the model's own forward pass, so that it can be timed.
        context: number of context tokens once text after it is read; None before.
        ahead: number of tokens after those read whose queries the policy has seen as well.
        compresses_context: whether entries are removed at the end of the context; otherwise only after it.
        removals: how often entries have been removed.
        is_kept_whole: whether the text being read is never removed, so that its queries need not be kept.
    """

    model: nn.Module
    policy: CachePolicy
    total: int
    row_seeds: Sequence[int]
    seed: int = 0
    chunk: int | None = None
    seen: list[float] = field(default_factory=list)
    peak: int = 0
    history: list[list[Tensor]] | None = None
    overhead: Callable[[], AbstractContextManager[object]] = nullcontext
    context: int | None = None
    ahead: int = 0
    compresses_context: bool = True
    removals: int = 0
    is_kept_whole: bool = False

    def __post_init__(self) -> None:
        needs = self.policy.needs
        needs_inv_freq = self.policy.rerotated or needs.moments or needs.rotations
        self.inv_freq = (inv_freq_by_layer(self.model) if needs_inv_freq else None) or ()
        self.cache = PolicyCache(self.policy.rerotated, self.inv_freq)
        self.read = self.since = self.removed_at = 0
        self.known: list[dict[int, Tensor]] = []  # by layer, what other sessions have found out about the same entries

    def prefill(self, ids: Tensor, first: int = 0, ahead: Tensor | None = None) -> Iterator[Scored]:
        """Feed the context, and remove entries whenever the policy says so and at the end."""
        yield from self._read(ids, first, ahead, self.compresses_context)
        if not self.compresses_context:
            self.since = 0  # what is written is counted from its own beginning

    def _read(
        self, ids: Tensor, first: int = 0, ahead: Tensor | None = None, removes_at_end: bool = False
    ) -> Iterator[Scored]:
        start, length = 0, ids.shape[1]
        while start < length:
            stop = min(length, start + (self.chunk or self.policy.run_length(self.read)))
            logits = self.feed(ids[:, start:stop], slice(max(0, first - start), None))
            if stop == length and self.chunk is not None and ahead is not None:
                self._look_ahead(ahead)
            if (stop == length and removes_at_end) or (self.chunk is None and self.is_due):
                self.remove()
            self.ahead = 0
            if stop > first:
                yield Scored(max(start, first), stop, logits)
            start = stop

    def extend(self, ids: Tensor) -> Iterator[Scored]:
        """Read text after the context without compressing it further.

        A policy that attends to a part of the entries (RefreshKV) goes on renewing its choice among those of the
        context.
        """
        with self.kept_whole():
            if self.policy.keeps_all:
                self.chunk = None
                yield from self._read(ids)
            elif ids.shape[1]:
                yield Scored(0, ids.shape[1], self.feed(ids))

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        """Within the block, text after the context is read: no entries of it will be removed."""
        if self.context is None:
            self.context = self.read
        self.is_kept_whole = not self.policy.keeps_all
        try:
            yield
        finally:
            self.is_kept_whole = False

    def expand(self, copies: int) -> None:
        self.cache.batch_repeat_interleave(copies)
        self.row_seeds = [seed for seed in self.row_seeds for _ in range(copies)]

    def step(self, ids: Tensor) -> Tensor:
        logits = self.feed(ids[:, None])
        self.settle()
        return logits[:, -1]

    def fill(self, batch: int, seed: int) -> None:
        """Store random entries for the whole context, layer by layer, and let the policy compress each layer."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        heads = int(text_config(self.model.config).num_attention_heads)
        self.read, chosen = self.total, dict[int, Tensor]()
        self.cache.layers = [PolicyLayer() for _ in cache_shape(self.model).layers]
        for number, (keys, values) in enumerate(random_entries(self.model, batch, self.total, seed)):
            layer = self.cache.layers[number]
            layer.extend(keys, values, 0)
            shape = (batch, heads, max(1, self.policy.window), keys.shape[-1])
            queries = torch.empty(shape, dtype=keys.dtype, device=keys.device).normal_(generator=generator)
            layer.scaling = float(keys.shape[-1]) ** -0.5
            if self.policy.window:
                layer.queries = queries
            if self.policy.needs.attention:
                layer.sums.uniform_(generator=generator)
            if self.policy.needs.moments:
                layer.moments = shape[2], queries.float().sum(2), (queries.transpose(-1, -2) @ queries).float()
            self.remove_from(number, chosen)
        self.peak, self.removed_at = self.cache.most_entries(), self.read

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def kept(self) -> int:
        return round(self.cache.mean_entries())

    @property
    def attended(self) -> int:
        """Entries that the next token attends to; packed ones are counted by their bytes."""
        return round(self.cache.mean_seen())

    def entries_by_head(self) -> list[list[float]]:
        return [layer.entries_by_head() for layer in self.cache.layers]

    def held_positions(self) -> list[Tensor] | None:
        if self.policy.packs or self.policy.merges:
            return None
        return [layer.positions for layer in self.cache.layers]

    def bytes(self) -> CacheBytes:
        cache = self.cache
        whole = self.total * whole_entry_bytes(self.model, cache.entry_bytes())
        return CacheBytes(cache.logical_bytes(), cache.physical_bytes(), whole)

    def tensors(self) -> list[Tensor]:
        return self.cache.tensors()

    def visible(self, queries: Tensor) -> Tensor:
        return torch.tensor(self.seen, dtype=torch.float64)[queries.clamp(max=len(self.seen) - 1)]

    def distance(self, targets: Tensor) -> Tensor | None:
        """None: entries are removed at many places."""
        return None

    def _look_ahead(self, ids: Tensor) -> None:
        """Let the policy see the queries of text after the context, if it uses queries.

        They attend to the whole context, before it is compressed. Their own entries are dropped afterwards: the text is
        then read again, from the compressed cache.
        """
        policy, count = self.policy, ids.shape[1]
        if not count or not policy.observes:
            return
        self.feed(ids, slice(0, 0))
        for number, layer in enumerate(self.cache.layers):
            self._observe(number, None)
            layer.forget(count)
        self.read -= count
        self.ahead = count
        del self.seen[-count:]

    @property
    def is_due(self) -> bool:
        return self.policy.is_due(self.read, self.since)

    def feed(self, ids: Tensor, wanted: slice = _ALL) -> Tensor:
        """Feed text ``[batch, m]`` and return logits ``[batch, wanted, vocabulary]``; nothing is removed."""
        m = ids.shape[1]
        places = self.begin(m).to(ids.device)
        token = OBSERVER.set(self)
        try:
            with self.patched():
                out = self.model(
                    input_ids=ids, attention_mask=torch.ones(1, 1, m, 1, dtype=torch.bool, device=ids.device),
                    position_ids=places[None], use_cache=True, past_key_values=self.cache,
                    logits_to_keep=0 if wanted == _ALL else torch.arange(m, device=ids.device)[wanted],
                )
        finally:
            OBSERVER.reset(token)
        self.end(m)
        logits: Tensor = out.logits
        return logits

    def patched(self) -> AbstractContextManager[None]:
        """Context manager around forward passes, within which the model computes what the policy changes."""
        return self.policy.patched(self.model)

    def begin(self, count: int) -> Tensor:
        """Prepare for a forward pass over the next ``count`` tokens, and return their positions, int64 ``[count]``."""
        cache = self.cache
        cache.is_full_step = self.policy.is_full_step(self.read)
        held = cache.mean_entries() if cache.is_full_step else cache.mean_seen()
        self.seen += [held + i for i in range(count)]
        if self.history is not None:
            self.history.append([(x.positions if cache.is_full_step else x.seen()).clone() for x in cache.layers])
        cache.read = cache.begin = self.read
        return torch.arange(self.read, self.read + count)

    def end(self, count: int) -> None:
        """Account for ``count`` tokens that have been fed."""
        self.read, self.since = self.read + count, self.since + count
        self.peak = max(self.peak, self.cache.most_entries())

    def settle(self) -> None:
        """Remove entries if that is due."""
        if self.is_due:
            self.remove()

    def remove(self) -> None:
        """Let the policy remove entries in every layer that holds more than its budget."""
        self.since = 0
        self.removals += 1
        with self.overhead():
            chosen: dict[int, Tensor] = {}
            for number in range(len(self.cache.layers)):
                self.remove_from(number, chosen)
        self.known, self.removed_at = [], self.read

    def remove_from(self, number: int, chosen: dict[int, Tensor]) -> None:
        """Remove entries of one layer; ``chosen``: by layer, the entries that earlier layers have chosen."""
        policy, layers = self.policy, self.cache.layers
        layer = layers[number]
        self._observe(number, None)
        keep = policy.budget(self.context or self.read, self.total, number, len(layers))
        if not policy.packs and (self.context or layer.entries()) > keep:
            view = self._view(number, last=self.context)
            entries = chosen.get(policy.follows(number))
            if entries is None:
                entries = chosen[number] = policy.chosen(view, keep)
            if policy.keeps_all:
                layer.attend_only(entries, self.context)
            else:
                merged = Merged(*policy.merged(view, entries))
                layer.choose(entries, (merged.keys, merged.values), merged.weights)
                layer.carried = merged.carried
        if policy.packs:
            found = policy.pack(self._view(number, layer.first_plain), layer.packed)
            if found is not None:
                layer.pack(*found)

    def _view(self, number: int, first: int = 0, last: int | None = None) -> LayerView:
        """The policy's view of a layer: entries from ``first`` (0, or the first that is not packed) up to ``last``."""
        layer = self.cache.layers[number]
        keys, values = (t[:, :, :last] for t in ((layer.keys, layer.values) if first else layer.present()))
        none = torch.zeros((), device=keys.device).expand(keys.shape[:3])
        sums = layer.sums[..., first:last] if self.policy.needs.attention else none
        return LayerView(
            keys=keys, values=values, positions=layer.positions[..., first:last], attention_sums=sums,
            queries=layer.queries, scaling=layer.scaling,
            read=self.read + (self.ahead if layer.queries is not None else 0), layer=number,
            layers=len(self.cache.layers), row_seeds=torch.tensor(list(self.row_seeds), device=keys.device),
            seed=self.seed, query_moments=layer.moments,
            inv_freq=self.inv_freq[number] if self.inv_freq else None,
            carried=layer.carried, known=self.known[number] if self.known else {},
            weights=None if layer.weights is None else layer.weights[..., first:last], model=self.model,
            removed_at=self.removed_at,
        )

    def mask(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        """Causal mask over all entries that the layer holds; None where the kernel's own causal mask is equivalent.

        It is bool, or float and added to the logits where entries stand for several tokens.
        """
        bias, queries, entries = self._bias(layer), query.shape[2], keys.shape[2]
        if bias is None and queries in (1, entries):
            return None
        causal = torch.ones(queries, entries, dtype=torch.bool, device=query.device).tril(entries - queries)
        return causal if bias is None else bias[:, :, None].masked_fill(~causal, float("-inf"))

    def _bias(self, layer: int) -> Tensor | None:
        """What is added to the logits of each entry ``[batch, heads, entries]``; None for nothing."""
        weights = self.cache.layers[layer].weights if self.policy.weighs else None
        return None if weights is None else weights.log()

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor | None:
        """Attention computed head by head, if heads hold different numbers of entries; None otherwise."""
        ragged = self.cache.layers[layer].ragged
        return None if ragged is None else ragged.attention(query, scaling)

    def observe(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """Collect queries; they are processed together, once there are many or before entries are removed."""
        policy, stored = self.policy, self.cache.layers[layer]
        stored.scaling = scaling
        if policy.observes and not self.is_kept_whole:
            stored.pending.append(query)
            if sum(pending.shape[2] for pending in stored.pending) >= QUERIES_AT_ONCE:
                with self.overhead():
                    self._observe(layer, keys)

    def take_over(self, source: PolicySession) -> None:
        """Go on from what another session has read, with a copy of its entries and statistics; nothing is removed.

        Nothing may be read before the first removal.
        """
        for number in range(len(source.cache.layers)):
            source._observe(number, None)
        self.cache.layers = copy.deepcopy(source.cache.layers)
        self.cache.read, self.cache.begin = source.cache.read, source.cache.begin
        self.read, self.since, self.seen, self.peak = source.read, source.since, list(source.seen), source.peak
        self.removed_at = source.removed_at
        self.known = source.known or [{} for _ in self.cache.layers]
        source.known = self.known

    def _observe(self, number: int, keys: Tensor | None) -> None:
        """Process the collected queries: keep the last of them, add up their attention, or update their moments.

        Args:
            keys: the keys that they attended to; None to rotate the stored ones again.
        """
        policy, layer = self.policy, self.cache.layers[number]
        if not layer.pending:
            return
        query = torch.cat(layer.pending, 2) if len(layer.pending) > 1 else layer.pending[0]
        layer.pending = []
        if policy.window:
            layer.queries = with_queries(layer.queries, query, policy.window)
        if policy.needs.attention:
            keys = self.cache.rerotate(number, layer.present()[0]) if keys is None else keys
            if policy.needs.decay != 1:
                layer.sums.mul_(policy.needs.decay ** query.shape[2])
            layer.sums.add_(received_attention(
                query, keys, layer.scaling, layer.positions, policy.needs.decay, self._bias(number)
            ))
        if policy.needs.moments:
            first = layer.read - query.shape[2]
            inv_freq = self.inv_freq[number] if self.inv_freq else None
            layer.moments = with_moments(layer.moments, query, first, policy.sinks, inv_freq)
