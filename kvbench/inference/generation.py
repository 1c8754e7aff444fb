"""The decoding loop: a prefix is read under a layout, and the model writes on, entry by entry removed.

The loop is the same for every method: the layout says what is fed besides the text (sentinels,
memory tokens) and what leaves the cache, also among what is being written. Every random number is
drawn before the loop, one per row and token, and used by inverting the cumulative distribution, so
that neither the batch nor its order decides what a row becomes, and methods share their luck.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache.evicting import EvictingCache
from kvbench.inference.layout_session import Flow, Reader
from kvbench.methods.layouts.layout import OPEN, Layout


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen where it is drawn.

    Attributes:
        top_p: the least set of most probable tokens with this much probability is drawn from
            (nucleus sampling, arXiv 1904.09751).
        temperature: logits are divided by it.
    """

    top_p: float = 0.9
    temperature: float = 1.0


def choose(logits: Tensor, uniforms: Tensor, sampling: Sampling, drawn: Tensor | None = None) -> Tensor:
    """The next token of every row.

    Args:
        logits: ``[rows, vocabulary]``.
        uniforms: float64 ``[rows]`` in [0, 1); a row with NaN is greedy.
        drawn: int64, the rows that are not; found out here if None, for which a GPU is waited for.

    Returns:
        int64 ``[rows]``.
    """
    best = logits.argmax(-1)
    drawn = torch.nonzero(~uniforms.isnan()).flatten() if drawn is None else drawn
    if len(drawn):
        p = (logits[drawn].double() / sampling.temperature).softmax(-1)
        best[drawn] = _inverted(_nucleus(p, sampling.top_p), uniforms[drawn])
    return best


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """Probabilities with those outside the nucleus set to 0; the most probable token is always in."""
    ordered, index = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    inside = (before < top_p).scatter(-1, index, before < top_p)
    return p * inside


def _inverted(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative weight, in the order of ids, passes the uniform's share."""
    total = weights.cumsum(-1)
    place = torch.searchsorted(total, uniforms[:, None] * total[:, -1:], right=True)[:, 0]
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(place, last)  # a uniform just below 1 may be rounded up to the total


@dataclass
class Continuation:
    """A batch of prefixes, and what the model writes after each.

    Attributes:
        prefix: ids ``[documents, P]``.
        uniforms: float64 ``[documents, outputs, G]``, NaN throughout for a greedy output.
        layout: of P + G tokens.
        ends: ids after which a row has ended.
        chunk: tokens of the prefix that are fed at a time.
        evicts: entries are really removed; otherwise only masked.
        is_finite: whether all predictions were, so far.
    """

    prefix: Tensor
    uniforms: Tensor
    layout: Layout
    sampling: Sampling
    ends: tuple[int, ...] = ()
    chunk: int = 64
    evicts: bool = True

    def __post_init__(self) -> None:
        self.cache = EvictingCache()
        self.is_finite = torch.ones((), dtype=torch.bool, device=self.prefix.device)
        self._flow = Flow(self.layout, self.cache, self.evicts)

    @property
    def new_tokens(self) -> int:
        return int(self.uniforms.shape[-1])

    def read(self, reader: Reader) -> Tensor:
        """Read the prefix: logits ``[documents, vocabulary]`` of the first token to write."""
        last = self.prefix.shape[1] - 1
        stop, wanted = self._turn(last), self.layout.read_slots[last]
        logits = None
        for start in range(0, stop, self.chunk):
            end = min(start + self.chunk, stop)
            here = wanted[None] if start <= int(wanted) < end else wanted.new_empty(0)
            found = reader.feed(reader.inputs(self.prefix, self.layout, slice(start, end)), self._flow, here)
            logits = found if len(here) else logits
        assert logits is not None, "the prefix has at least one token"
        return logits[:, 0]

    @property
    def visible_before(self) -> Tensor:
        """``[P + G]``: how many earlier entries are seen where the token after each is chosen."""
        return self.layout.visible_before

    @property
    def left(self) -> int:
        """Entries that are held when the prefix has been read."""
        stop = self._turn(self.prefix.shape[1] - 1)
        return len(self.layout.held_after(stop)) if self.evicts else stop

    def assume(self, cache: EvictingCache) -> None:
        """Go on as if the prefix had been read and ``cache`` held the ``left`` entries of it."""
        self.cache = cache
        self._flow.resume(self._turn(self.prefix.shape[1] - 1), cache)

    def write(self, reader: Reader, logits: Tensor) -> Iterator[Tensor]:
        """Choose, feed, choose ...: yields ids int64 ``[documents * outputs]``, -1 in rows that have ended.

        Args:
            logits: what ``read`` returned.
        """
        documents, outputs, steps = self.uniforms.shape
        self._flow.is_loose = True
        if outputs > 1:
            self.cache.batch_repeat_interleave(outputs)
            logits = logits.repeat_interleave(outputs, dim=0)
        drawn = torch.nonzero(~self.uniforms.flatten(0, 1)[:, 0].isnan()).flatten().to(logits.device)
        uniforms = self.uniforms.flatten(0, 1).to(logits.device)
        ended = torch.zeros(documents * outputs, dtype=torch.bool, device=logits.device)
        ends = torch.tensor(self.ends, dtype=torch.long, device=logits.device)
        token = self.prefix.shape[1]
        for step in range(steps):
            self.is_finite &= torch.isfinite(logits).all()
            ids = choose(logits, uniforms[:, step], self.sampling, drawn)
            yield ids.masked_fill(ended, -1)
            if len(ends):
                ended |= torch.isin(ids, ends)
                if bool(ended.all()):
                    return
            if step + 1 < steps:
                logits = self._step(reader, ids, token + step)

    def _step(self, reader: Reader, ids: Tensor, token: int) -> Tensor:
        """Feed a token of every row, and the special tokens up to the next one."""
        fed, stop = self._flow.fed, self._turn(token)
        inputs = ids[:, None]
        if stop - fed > 1:
            assert reader.adapter is not None or self.layout.mixture is not None
            inputs = self._with_special(reader, inputs, fed, stop)
        return reader.feed(inputs, self._flow, self.layout.read_slots[token][None])[:, 0]

    def _with_special(self, reader: Reader, ids: Tensor, fed: int, stop: int) -> Tensor:
        """Ids ``[rows, 1]`` with the special tokens up to ``stop``: addresses as ids, which are not read, others as
        embeddings."""
        if reader.adapter is None:
            return ids.expand(-1, stop - fed)
        row = self.layout.tokens.row[fed:stop].to(ids.device, non_blocking=True)
        text: Tensor = reader.model.get_input_embeddings()(ids)  # type: ignore[operator]
        special = reader.adapter.rows.to(text.dtype)[row.clamp(min=0)].expand(len(ids), -1, -1)
        return torch.where((row < 0)[None, :, None], text, special)

    def _turn(self, token: int) -> int:
        """One past the last slot that is fed with a text token: what opens a span waits for its text."""
        raw, kind = self.layout.raw_slots, self.layout.tokens.kind
        stop = int(raw[token + 1]) if token + 1 < len(raw) else len(self.layout)
        while int(kind[stop - 1]) == OPEN:
            stop -= 1
        return stop
