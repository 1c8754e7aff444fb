"""Policies: methods that choose what to keep from what was computed.

A policy scores the entries of a layer; the highest are kept, as many as the budget says, chosen for every row
and head by itself unless the policy says otherwise. Scores are float32, and of equal ones the later entry is kept: in
half precision ties decide the set. Entries are attended first and removed after (docs/definitions.md).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kvbench.errors import UserError
from kvbench.methods.base import Effect, Method
from kvbench.methods.budget import kept, ratio_text
from kvbench.methods.options import option

if TYPE_CHECKING:
    from kvbench.cache.stored import StoredEntries


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """A layer when something has to be removed from it.

    Attributes:
        keys, values: ``[batch, heads, entries, width]``; keys as they are cached, rotated to their places.
        positions: int64 ``[batch, heads, entries]``, ascending; -1 in front where a head has fewer than another.
        attention_sums: float32 ``[batch, heads, entries]``: attention received so far, summed over queries and over
            the query heads of each head; zero unless the policy needs it.
        queries: the last ``CachePolicy.window`` queries ``[batch, query heads, w, width]``, rotated; None if that is 0.
        scaling: of the attention's logits.
        read: text tokens read so far.
        layer, layers: which of how many.
        row_seeds: int64 ``[batch]``, a seed of each row that depends on its text only, for policies that draw.
        seed: of the run.
        query_moments: of the queries so far, before they were rotated, if the policy takes them: how many, their sum
            ``[batch, query heads, width]`` and the sum of their outer products.
        inv_freq: angle per position of each pair of coordinates, where the policy needs it and keys are rotated.
        carried: what :meth:`CachePolicy.merged` handed on when entries were last removed from this layer; None before.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    attention_sums: Tensor
    queries: Tensor | None
    scaling: float
    read: int
    layer: int
    layers: int
    row_seeds: Tensor
    seed: int
    query_moments: tuple[int, Tensor, Tensor] | None = None
    inv_freq: Tensor | None = None
    carried: Tensor | None = None

    @property
    def entries(self) -> int:
        return int(self.keys.shape[-2])

    def attention(self, last: int) -> Tensor:
        """Attention of the ``last`` queries: float32 ``[batch, heads, group, last, entries]``, causal."""
        assert self.queries is not None, "the policy has a window"
        batch, heads, _, width = self.keys.shape
        queries = self.queries[:, :, -last:]
        grouped = queries.reshape(batch, heads, -1, width).float()  # not spread over the group: keys would be copied
        logits = (grouped @ self.keys.float().transpose(-1, -2)).mul_(self.scaling)
        logits = logits.view(batch, heads, -1, queries.shape[2], self.entries)
        places = torch.arange(self.read - queries.shape[2], self.read, device=logits.device)
        positions = self.positions[:, :, None, None, :]
        hidden = (positions > places[:, None]) | (positions < 0)
        return logits.masked_fill_(hidden, float("-inf")).softmax(-1)


class Merged(NamedTuple):
    """Entries when some are removed, as they shall be stored.

    Attributes:
        keys, values: ``[batch, heads, entries, width]``, of those that go as well.
        carried: ``[batch, ...]``, handed on to the next removal from the layer; None for nothing.
    """

    keys: Tensor
    values: Tensor
    carried: Tensor | None = None


class Needs(NamedTuple):
    """What a policy has to be shown, besides keys, values and its ``window`` of last queries.

    Attributes:
        attention: the attention of all queries, summed; ``decay``: what is left of it after each further query.
        moments: mean and covariance of the queries.
    """

    attention: bool = False
    decay: float = 1.0
    moments: bool = False


@dataclass(frozen=True)
class CachePolicy(Method):
    """A method that scores entries.

    Attributes:
        needs: what it is to be shown.
        shares_heads: all heads of a layer keep the same entries.
        step, prefill: options of every policy.
        window: last queries that it is shown; ``sinks``: first tokens of the text that stay. Options, where a policy
            makes them one.
    """

    needs: ClassVar[Needs] = Needs()
    shares_heads: ClassVar[bool] = False

    step: int = option(16, "tokens that are read or written between two removals", least=1)
    prefill: str = option(
        "once", "whether a context is compressed when it has been read, or after every step", choices=("once", "blocks")
    )
    window: int = field(default=0, kw_only=True)
    sinks: int = field(default=0, kw_only=True)

    def check(self, longest: int, in_chunks: bool) -> None:
        if in_chunks:
            raise UserError(
                f"{self.name} chooses among the tokens of one running text, and this task's text comes in chunks.",
                "Measure it on another task.",
            )

    def check_kept(self, n: int) -> None:
        """More sinks than by default need room: they are held whatever the ratio, which would not be met."""
        sinks = self.options().get("sinks")
        if sinks is not None and self.sinks > int(sinks.default):
            check_room(self, n, "sinks", "the ratio would not be met")

    @property
    def rerotated(self) -> int:
        """How many of the first keys are re-rotated to their index in the cache (StreamingLLM)."""
        return 0

    @property
    def packs(self) -> bool:
        """Whether nothing is removed, and older entries are stored in another form."""
        return self.effect is Effect.PACKS

    @property
    def keeps_all(self) -> bool:
        """Whether what is not chosen stays, unattended until the next step with full attention."""
        return self.effect is Effect.ATTENDS_LESS

    @property
    def observes(self) -> bool:
        """Whether it has to be shown queries."""
        return bool(self.window or self.needs.attention or self.needs.moments)

    @property
    def minimum(self) -> int:
        return self.sinks + 1

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        """Entries that a layer holds after ``read`` of ``total`` tokens.

        However little has been read, sinks are held: one that has once been removed does not return.
        """
        return read if self.packs else min(read, max(self.sinks + 1, self.held_after(read)))

    def constant(self, total: int) -> int:
        """What policies hold whose cache does not grow: kept(N, r) entries of N tokens, or the budget."""
        return max(self.minimum, self.budget_tokens or kept(total, self.ratio))

    def held_after(self, read: int) -> int:
        """Entries of a layer, on average: a share of what was read, or a constant number where one is given."""
        return min(read, self.budget_tokens) if self.budget_tokens else kept(read, self.ratio)

    def on(self, model: nn.Module) -> AbstractContextManager[None]:
        """Entered around the model's forward passes, for policies that change what it computes."""
        return nullcontext()

    def run_length(self, read: int) -> int:
        """How many tokens are fed at a time where entries are removed on the way."""
        return self.step

    def is_due(self, read: int, since: int) -> bool:
        """Whether entries are removed now, ``since`` tokens after the last time."""
        return since >= self.step

    def is_full_step(self, read: int) -> bool:
        """Whether the next step uses full attention (RefreshKV)."""
        return False

    def follows(self, layer: int) -> int:
        """The layer whose choice this one takes over; itself if it makes its own."""
        return layer

    def scores(self, view: LayerView) -> Tensor:
        """float ``[batch, heads, entries]``: how much each entry is worth keeping; infinite for what must stay.

        By default the later is worth more, behind the sinks.
        """
        return protect_first(view.positions.float(), view.positions, self.sinks)

    def chosen(self, view: LayerView, keep: int) -> Tensor:
        """int64 ``[batch, heads, keep]``, ascending: the entries that stay."""
        scores = self.scores(view).float()
        if self.shares_heads:
            scores = scores.mean(1, keepdim=True).expand_as(scores)
        return highest(scores, keep)

    def merged(self, view: LayerView, entries: Tensor) -> Merged:
        """All entries, with what is lost in the others added to ``entries``, if anything is."""
        return Merged(view.keys, view.values)

    def pack(self, view: LayerView, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, int] | None:
        """The first entries in another form, and how many they are; None if there are none to pack yet.

        Args:
            view: the entries that are held as they are.
            earlier: what has been packed before.
        """
        return None


def highest(scores: Tensor, keep: int) -> Tensor:
    """The places of the ``keep`` highest scores, ascending; of equal ones the last."""
    least = scores.kthvalue(scores.shape[-1] - keep + 1, dim=-1, keepdim=True).values
    chosen = scores >= least
    if int(chosen.sum()) > keep * scores[..., 0].numel():  # more are equal to the least than there is place for
        above = scores > least
        place = keep - above.sum(-1, keepdim=True)
        last = (scores == least).flip(-1).cumsum(-1).flip(-1) <= place
        chosen = above | (chosen & last)
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], keep)


def protect_last(scores: Tensor, count: int) -> Tensor:
    """Scores with the last ``count`` entries beyond all others."""
    recent = torch.arange(scores.shape[-1], device=scores.device) >= scores.shape[-1] - count
    return scores.masked_fill(recent, float("inf"))


def protect_first(scores: Tensor, positions: Tensor, count: int) -> Tensor:
    """Scores with the first ``count`` tokens of the text beyond all others, where they are still held."""
    return scores.masked_fill(positions < count, float("inf"))


def check_room(policy: CachePolicy, n: int, name: str, otherwise: str) -> None:
    """See that what is kept of ``n`` entries has room for what an option protects, and for one more.

    Raises:
        UserError: it has not; ``otherwise``: what would come of it.
    """
    left, needed = kept(n, policy.ratio), policy.minimum
    if left < min(n, needed):
        most = left - (needed - getattr(policy, name))
        raise UserError(
            f"{policy.name} at ratio {ratio_text(policy.ratio)} keeps {left} of {n} entries, below the {needed} that "
            f"it needs: {otherwise}.",
            f"Give a smaller --ratio, or --set {name}={most}." if most > 0 else "Give a smaller --ratio.",
        )


def check_kernel(kernel: int) -> None:
    """See that smoothing has a middle.

    Raises:
        UserError: it spans an even number of places.
    """
    if kernel % 2 == 0:
        raise UserError(f"--set kernel={kernel} has no middle.", "Give an odd number of places.")


def lost(view: LayerView, entries: Tensor) -> Tensor:
    """bool ``[batch, heads, entries]``: what does not stay."""
    return torch.ones_like(view.positions, dtype=torch.bool).scatter_(-1, entries, False)
