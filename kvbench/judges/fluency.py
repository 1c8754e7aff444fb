"""Fluency: the likelihood of a continuation given its prefix under a language model, the scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from kvbench.models.rope import dynamic_rotary, fixed_rotations
from kvbench.protocols.pieces import make_tokenizer

ROWS = 16


class Fluency(NamedTuple):
    """Negative log-likelihood of a text in nats, and the number of the scorer's tokens that it sums over."""

    nll: float
    tokens: int


@dataclass(frozen=True)
class Scorer:
    """A causal language model with its full cache, which scores texts.

    Prefix and continuation are tokenised together by the scorer's own tokenizer, whichever model wrote
    the text; a token that spans the boundary belongs to the continuation. If both do not fit the scorer's
    context, the beginning of the prefix is dropped.
    """

    model: nn.Module
    tokenizer: Any
    context: int

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Fluency]:
        """The fluency of each text in (prefix, text) pairs; an empty text has no tokens.

        Raises:
            RuntimeError: the scorer's predictions are not finite.
        """
        cut = make_tokenizer(self.tokenizer, "auto")
        lead = list(cut.lead())
        rows: list[tuple[int, list[int], list[int]]] = []
        for i, (prefix, text) in enumerate(pairs):
            before, after = (list(part.ids) for part in cut.split((prefix, text)))
            ids = after[: self.context - len(lead) - 1]
            if ids:
                room = self.context - len(lead) - len(ids)
                rows.append((i, [*lead, *before[-room:]], ids))
        found = [Fluency(0.0, 0)] * len(pairs)
        rows.sort(key=lambda row: (len(row[1]), len(row[2])))
        for alike in self._alike(rows):
            for start in range(0, len(alike), ROWS):
                with fixed_rotations(self.model, len(alike[0][1]) + len(alike[0][2])):
                    self._score(alike[start : start + ROWS], found)
        return found

    def _alike(self, rows: list[tuple[int, list[int], list[int]]]) -> list[list[tuple[int, list[int], list[int]]]]:
        """Groups of rows that can share a batch: rows of equal length if rotations depend on it, otherwise all."""
        if not dynamic_rotary(self.model):
            return [rows] if rows else []
        whole: dict[int, list[tuple[int, list[int], list[int]]]] = {}
        for row in rows:
            whole.setdefault(len(row[1]) + len(row[2]), []).append(row)
        return list(whole.values())

    def _score(self, rows: list[tuple[int, list[int], list[int]]], found: list[Fluency]) -> None:
        """Score a batch of rows, padded on the right, where causal attention never reaches, into ``found``."""
        device = next(self.model.parameters()).device
        longest = max(len(prefix) + len(text) for _, prefix, text in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, (_, prefix, text) in enumerate(rows):
            ids[row, : len(prefix) + len(text)] = torch.tensor([*prefix, *text])
        first = max(0, min(len(prefix) for _, prefix, _ in rows) - 1)
        keep = torch.arange(first, longest - 1, device=device)
        with torch.inference_mode():
            logits = self.model(
                ids.to(device), attention_mask=torch.ones_like(ids, device=device), use_cache=False,
                logits_to_keep=keep,
            ).logits.float()
            nll = functional.cross_entropy(
                logits.flatten(0, 1), ids[:, first + 1 :].to(device).flatten(), reduction="none"
            ).view(len(rows), -1).double().cpu()
        for row, (i, prefix, text) in enumerate(rows):
            start = len(prefix) - 1 - first
            skip = 1 if start < 0 else 0  # without any prefix the first token is context only
            mine = nll[row, start + skip : start + len(text)]
            if not bool(torch.isfinite(mine).all()):
                raise RuntimeError("the scorer's predictions are not finite (overflow, or damaged weights)")
            found[i] = Fluency(float(mine.sum()), len(mine))
