"""Reading text while a policy removes entries: attend first, remove after.

Every layer is attended under the mask of its own entries (all that it holds, causally), since layers and heads hold
different ones. What was chosen can be written down, so that one masked pass can show that it was the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kvbench.cache.policed import PolicedCache
from kvbench.decoding import Continuation
from kvbench.methods.policy import Policy, View
from kvbench.models.attention import WATCHER
from kvbench.models.rotary import frequencies
from kvbench.runtime import Reader, Scored

QUERIES_AT_ONCE = 64
"""Queries whose attention is summed at a time."""


@dataclass
class Policing:
    """A batch of texts being read under a policy; a fresh one for every batch.

    Attributes:
        total: text tokens that will be read under it, or up to which the budget is met.
        lots: a number of each row that depends on its text only.
        seen: for every token read, how many earlier entries it saw (the mean over layers).
        peak: the most entries that a layer ever held.
        kept: if asked for, what every layer held when each run of tokens was fed: ``[batch, heads, entries]`` places.
    """

    model: nn.Module
    policy: Policy
    total: int
    lots: Sequence[int]
    seed: int = 0
    seen: list[float] = field(default_factory=list)
    peak: int = 0
    kept: list[list[Tensor]] | None = None

    def __post_init__(self) -> None:
        speeds = frequencies(self.model) if self.policy.rebases else None
        self.cache = PolicedCache(self.policy.number("sinks") if speeds is not None else 0, speeds)
        self.read = 0

    def stream(self, ids: Tensor, step: int, first: int = 0, once: bool = False) -> Iterator[Scored]:
        """Feed ``step`` tokens at a time, and remove entries after each; or once, at the end.

        Args:
            ids: ``[batch, n]``.
            first: text token from which on logits are wanted.
        """
        for start in range(0, ids.shape[1], step):
            stop = min(start + step, ids.shape[1])
            wanted = slice(max(0, first - start), None)
            logits = self.feed(ids[:, start:stop], wanted)
            if not once or stop == ids.shape[1]:
                self.remove()
            if stop > first:
                yield Scored(max(start, first), stop, logits)

    def feed(self, ids: Tensor, wanted: slice = slice(None)) -> Tensor:
        """Logits ``[batch, wanted, vocabulary]`` of text ``[batch, m]`` after what was read; nothing is removed."""
        m, held = ids.shape[1], self.cache.mean_entries()
        if self.kept is not None:
            self.kept.append([layer.positions.clone() for layer in self.cache.layers])
        self.cache.read = self.read
        places = torch.arange(self.read, self.read + m, device=ids.device)
        token = WATCHER.set(self)
        try:
            out = self.model(
                input_ids=ids, attention_mask=torch.ones(1, 1, m, 1, dtype=torch.bool, device=ids.device),
                position_ids=places[None], use_cache=True, past_key_values=self.cache,
                logits_to_keep=torch.arange(m, device=ids.device)[wanted],
            )
        finally:
            WATCHER.reset(token)
        self.read += m
        self.seen += [held + i for i in range(m)]
        self.peak = max(self.peak, self.cache.most_entries())
        logits: Tensor = out.logits
        return logits

    def remove(self) -> None:
        """Let the policy choose, in every layer that holds more than its budget."""
        layers = self.cache.layers
        for number, layer in enumerate(layers):
            keep = self.policy.budget(self.read, self.total, number, len(layers))
            if layer.keys.shape[-2] > keep:
                layer.choose(self.policy.chosen(self._view(number), keep))

    def _view(self, number: int) -> View:
        layer = self.cache.layers[number]
        return View(
            layer.keys, layer.values, layer.positions, layer.sums, layer.queries, layer.scaling, self.read, number,
            len(self.cache.layers), torch.tensor(list(self.lots), device=layer.keys.device), self.seed,
        )

    def mask(self, layer: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """All that is held, causally."""
        if queries in (1, keys):
            return None
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)

    def watch(self, layer: int, query: Tensor, scaling: float) -> None:
        """Keep the last queries, or add up what they attend."""
        stored = self.cache.layers[layer]
        stored.scaling = scaling
        if self.policy.looks_at:
            before = query[:, :, :0] if stored.queries is None else stored.queries
            stored.queries = torch.cat([before, query], 2)[:, :, -self.policy.looks_at :].clone()
        if self.policy.sums:
            stored.sums += attended(query, stored.keys, scaling)


@dataclass
class PolicedContinuation(Continuation):
    """A batch of prefixes and what is written after each, under a policy: the same loop, fed in another way.

    The prefix is compressed once, when it has been read, unless the policy is told to do it block by block; while
    text is written, entries are removed after every ``step`` tokens.
    """

    run: Policing = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cache = self.run.cache

    def read(self, reader: Reader) -> Tensor:
        once, last = self.run.policy.option("prefill") == "once", self.prefix.shape[1] - 1
        step = self.chunk if once else self.run.policy.number("step")
        *_, part = self.run.stream(self.prefix, step, last, once)
        self._note(reader)
        return part.logits[:, -1]

    def write(self, reader: Reader, logits: Tensor) -> Iterator[Tensor]:
        self.run.lots = [lot for lot in self.run.lots for _ in range(self.uniforms.shape[1])]
        yield from super().write(reader, logits)

    def _step(self, reader: Reader, ids: Tensor, token: int) -> Tensor:
        logits = self.run.feed(ids[:, None])
        if (self.run.read - self.prefix.shape[1]) % self.run.policy.number("step") == 0:
            self.run.remove()
        self._note(reader)
        return logits[:, -1]

    def _note(self, reader: Reader) -> None:
        reader.trace.held, reader.trace.peak = round(self.run.cache.mean_entries()), self.run.peak

    @property
    def visible_before(self) -> Tensor:
        seen, length = self.run.seen, self.prefix.shape[1] + self.new_tokens
        return torch.tensor(seen + seen[-1:] * (length - len(seen)), dtype=torch.float64)


def attended(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Attention that entries receive from the last queries, summed over queries and query heads, causally.

    Args:
        query: ``[batch, query heads, q, d]``, of the last q entries.
        keys: ``[batch, heads, entries, d]``.

    Returns:
        float32 ``[batch, heads, entries]``.
    """
    batch, heads, entries, width = keys.shape
    grouped = query.reshape(batch, heads, -1, query.shape[2], width).float()
    spread = keys.float()[:, :, None].transpose(-1, -2)
    total = torch.zeros(batch, heads, entries, device=keys.device)
    place = torch.arange(entries, device=keys.device)
    for start in range(0, query.shape[2], QUERIES_AT_ONCE):
        part = grouped[:, :, :, start : start + QUERIES_AT_ONCE]
        own = entries - query.shape[2] + start + torch.arange(part.shape[3], device=keys.device)
        logits = (part @ spread * scaling).masked_fill(place > own[:, None], float("-inf"))
        total += logits.softmax(-1).sum((2, 3))
    return total
