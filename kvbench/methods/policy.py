"""Policies: methods that choose what to keep from what was computed.

A policy scores the entries of a layer; the highest are kept, as many as the budget says, chosen for every row
and head by itself unless the policy says otherwise. Scores are float32, and of equal ones the later entry is kept: in
half precision ties decide the set. Entries are attended first and removed after (docs/definitions.md).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.base import Method, Option, kept
from kvbench.methods.layout import RUNNING, Layout, Structure, everything, plain_tokens

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class View:
    """A layer when something has to be removed from it.

    Attributes:
        keys, values: ``[batch, heads, entries, width]``; keys as they are cached, rotated to their places.
        positions: int64 ``[batch, heads, entries]``, ascending.
        sums: float32 ``[batch, heads, entries]``: attention received so far, summed over queries and over the
            query heads of each head; zero unless the policy sums.
        queries: the last ``Policy.looks_at`` queries ``[batch, query heads, w, width]``, rotated; None if that is 0.
        scaling: of the attention's logits.
        read: text tokens read so far.
        layer, layers: which of how many.
        lots: int64 ``[batch]``, a number of each row that depends on its text only, for policies that draw.
        seed: of the run.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    sums: Tensor
    queries: Tensor | None
    scaling: float
    read: int
    layer: int
    layers: int
    lots: Tensor
    seed: int

    @property
    def entries(self) -> int:
        return int(self.keys.shape[-2])

    def attention(self, last: int) -> Tensor:
        """Attention of the ``last`` queries: float32 ``[batch, heads, group, last, entries]``, causal."""
        assert self.queries is not None, "the policy has a window"
        batch, heads, _, width = self.keys.shape
        queries = self.queries[:, :, -last:]
        grouped = queries.reshape(batch, heads, -1, queries.shape[2], width).float()
        logits = grouped @ self.keys.float()[:, :, None].transpose(-1, -2) * self.scaling
        places = torch.arange(self.read - queries.shape[2], self.read, device=logits.device)
        hidden = self.positions[:, :, None, None, :] > places[:, None]
        return logits.masked_fill(hidden, float("-inf")).softmax(-1)


class Policy(Method):
    """A method that scores entries.

    Attributes:
        window: queries that it looks at; ``sums``: whether attention is summed over all queries.
        shares_heads: all heads of a layer keep the same entries.
        rebases: positions are counted in the cache, not in the text.
    """

    is_policy: ClassVar[bool] = True
    window: ClassVar[int] = 0
    sums: ClassVar[bool] = False
    shares_heads: ClassVar[bool] = False
    known: ClassVar[dict[str, Option]] = {
        "step": Option("16", least=1), "prefill": Option("once", ("once", "blocks")),
    }

    def check(self, longest: int, in_chunks: bool) -> None:
        if in_chunks:
            raise UserError(
                f"{self.name} chooses among the tokens of one running text, and this task's text comes in chunks.",
                "Measure it on another task.",
            )

    def layout(self, n: int, rng: np.random.Generator, text: Structure = RUNNING) -> Layout:
        """What is fed: the text, and nothing else."""
        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, everything, n)

    @property
    def policy(self) -> Policy:
        return self

    @property
    def rebases(self) -> bool:
        return False

    @property
    def looks_at(self) -> int:
        """Queries that have to be kept for it."""
        return self.window

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        """Entries that a layer holds after ``read`` of ``total`` tokens."""
        return kept(read, self.ratio)

    @abstractmethod
    def scores(self, view: View) -> Tensor:
        """float ``[batch, heads, entries]``: how much each entry is worth keeping; infinite for what must stay."""

    def chosen(self, view: View, keep: int) -> Tensor:
        """int64 ``[batch, heads, keep]``, ascending: the entries that stay."""
        scores = self.scores(view).float()
        if self.shares_heads:
            scores = scores.mean(1, keepdim=True).expand_as(scores)
        return highest(scores, keep)


def highest(scores: Tensor, keep: int) -> Tensor:
    """The places of the ``keep`` highest scores, ascending; of equal ones the last."""
    backwards = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return (scores.shape[-1] - 1 - backwards).sort(-1).values


def protect_last(scores: Tensor, count: int) -> Tensor:
    """Scores with the last ``count`` entries beyond all others."""
    recent = torch.arange(scores.shape[-1], device=scores.device) >= scores.shape[-1] - count
    return scores.masked_fill(recent, float("inf"))


def protect_first(scores: Tensor, positions: Tensor, count: int) -> Tensor:
    """Scores with the first ``count`` tokens of the text beyond all others, where they are still held."""
    return scores.masked_fill(positions < count, float("inf"))
