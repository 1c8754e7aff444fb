"""Fluency: the likelihood of a continuation given its prefix under a language model, the scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvbench.cache.evicting import EvictingCache
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.opening import prepared
from kvbench.inference.reader import Reader
from kvbench.methods import make_layout
from kvbench.methods.layouts.full import Full
from kvbench.protocols.pieces import Tokenizer, make_tokenizer


class Fluency(NamedTuple):
    """Negative log-likelihood of a text in nats, and the number of the scorer's tokens that it sums over."""

    nll: float
    tokens: int


class _Prefix(NamedTuple):
    """The tokens of a prefix, and its keys and values by layer; without any if it is read again for every text."""

    ids: list[int]
    entries: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scorer:
    """A causal language model with its full cache, which scores texts.

    Prefix and continuation are tokenised together by the scorer's own tokenizer, whichever model wrote
    the text; a token that spans the boundary belongs to the continuation. If both do not fit the scorer's
    context, the beginning of the prefix is dropped. A text is never read beside another one: its value does not
    depend on what else is scored, down to the last digit.

    Attributes:
        context: the longest text that the model reads, in tokens.
        shared_up_to: the longest text, in tokens, whose prefix is read once for all texts after it; longer ones, and
            all texts under models that kvbench cannot keep a full cache for, are read with their prefix.
        read: the prefixes that have been read, for texts that are scored later; cleared by the caller.
    """

    model: nn.Module
    tokenizer: Any
    context: int
    shared_up_to: int = 0
    read: dict[str, _Prefix] = field(default_factory=dict)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Fluency]:
        """The fluency of each text in (prefix, text) pairs; an empty text has no tokens.

        Raises:
            RuntimeError: the scorer's predictions are not finite.
        """
        cut = make_tokenizer(self.tokenizer, "auto")
        found = []
        for prefix, text in pairs:
            if self.shared_up_to and prefix not in self.read:
                self.read[prefix] = self._read(cut, prefix)
            found.append(self._fluency(*self._cut(cut, prefix, text), self.read.get(prefix, _Prefix([], []))))
        return found

    def _cut(self, cut: Tokenizer, prefix: str, text: str) -> tuple[list[int], int]:
        """The tokens to read, and the index of the continuation's first; without any prefix, of its second."""
        lead = list(cut.lead())
        before, after = (list(part.ids) for part in cut.split((prefix, text)))
        after = after[: self.context - len(lead) - 1]
        before = [*lead, *before[-(self.context - len(lead) - len(after)) :]]
        return [*before, *after], max(1, len(before))

    def _read(self, cut: Tokenizer, prefix: str) -> _Prefix:
        ids = [*cut.lead(), *cut.split((prefix,))[0].ids][: self.shared_up_to]
        if not ids:
            return _Prefix([], [])
        cache = EvictingCache()
        with torch.inference_mode(), prepared(self.model, None, len(ids)):
            whole = self._tensor(ids)
            places = torch.arange(len(ids), device=whole.device)
            Reader(self.model).forward(whole, None, places, places[-1:], cache, 0)
        return _Prefix(ids, [(layer.keys, layer.values) for layer in cache.layers])

    def _fluency(self, ids: list[int], start: int, prefix: _Prefix) -> Fluency:
        """The fluency of the tokens from ``start`` on of a text that begins with the prefix, or with a part of it."""
        if start >= len(ids):
            return Fluency(0.0, 0)
        common = min(_in_common(prefix.ids, ids), start - 1) if len(ids) <= self.shared_up_to else 0
        whole = self._tensor(ids)
        with torch.inference_mode(), prepared(self.model, None, len(ids)):
            if common:
                session = LayoutSession(Reader(self.model), make_layout(Full(), common, 0, 0), common)
                session.take_over((keys[:, :, :common], values[:, :, :common]) for keys, values in prefix.entries)
                (part,) = session.extend(whole[:, common:-1])
                logits = part.logits[0, start - 1 - common :]
            else:
                keep = torch.arange(start - 1, len(ids) - 1, device=whole.device)
                logits = self.model(
                    whole, attention_mask=torch.ones_like(whole), use_cache=False, logits_to_keep=keep
                ).logits[0]
            nll = functional.cross_entropy(logits.float(), whole[0, start:], reduction="none").double().cpu()
        if not bool(torch.isfinite(nll).all()):
            raise RuntimeError("the scorer's predictions are not finite (overflow, or damaged weights)")
        return Fluency(float(nll.sum()), len(nll))

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=next(self.model.parameters()).device)


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
