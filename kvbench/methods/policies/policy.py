"""Policies: methods that choose which entries to keep by computed keys, values and attention.

A policy scores the entries of a layer; those with the highest scores are kept, as many as the budget allows, for every
row and head separately unless the policy says otherwise. Scores are float32 (in half precision ties would decide), and
of equal scores the later entry is kept. Tokens attend first, entries are removed after (docs/definitions.md).
"""

from __future__ import annotations

import inspect
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
    """The state of a layer from which a policy chooses entries.

    Attributes:
        keys, values: ``[batch, heads, entries, width]``; keys as cached, after the rotary embedding.
        positions: int64 ``[batch, heads, entries]``, in the text, ascending; -1 in front where a head has fewer.
        attention_sums: float32 ``[batch, heads, entries]``: attention received so far, summed over queries and over the
            query heads of each head; zero unless the policy needs it.
        queries: the last ``CachePolicy.window`` queries ``[batch, query heads, w, width]``, rotated; None if that is 0.
        scaling: factor of the attention logits.
        read: text tokens read so far.
        layer, layers: index of the layer, and number of layers.
        row_seeds: int64 ``[batch]``, a seed for each row that depends on its text only, for random policies.
        seed: seed of the run.
        query_moments: of the queries so far, before the rotary embedding, if the policy needs them: number, sum
            ``[batch, query heads, width]`` and sum of outer products.
        inv_freq: inverse frequencies of the rotary embedding ``[d / 2]``, if needed and if keys are rotated.
        carried: what :meth:`CachePolicy.merged` returned when entries were last removed from this layer; None before.
        weights: float32 ``[batch, heads, entries]``, how many tokens each entry stands for; None if each is one token.
        known: mean attention by number of queries, shared by all policies that choose from the same entries.
        model: whose entries these are; None where a policy is tried without one.
        removed_at: text tokens that had been read when entries were last removed, or could have been; 0 before that.
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
    weights: Tensor | None = None
    known: dict[int, Tensor] = field(default_factory=dict)
    model: nn.Module | None = None
    removed_at: int = 0

    @property
    def entries(self) -> int:
        return int(self.keys.shape[-2])

    def attention(self, last: int) -> Tensor:
        """Attention weights of the ``last`` queries: float32 ``[batch, heads, group, last, entries]``, causal."""
        assert self.queries is not None, "the policy has a window"
        batch, heads, _, width = self.keys.shape
        queries = self.queries[:, :, -last:]
        grouped = queries.reshape(batch, heads, -1, width).float()  # grouped, so that keys need not be repeated
        logits = (grouped @ self.keys.float().transpose(-1, -2)).mul_(self.scaling)
        if self.weights is not None:
            logits += self.weights.log()[:, :, None]
        logits = logits.view(batch, heads, -1, queries.shape[2], self.entries)
        places = torch.arange(self.read - queries.shape[2], self.read, device=logits.device)
        positions = self.positions[:, :, None, None, :]
        hidden = (positions > places[:, None]) | (positions < 0)
        return logits.masked_fill_(hidden, float("-inf")).softmax(-1)

    def mean_attention(self, last: int) -> Tensor:
        """Attention weights of the ``last`` queries, the mean over them and over the query heads of each head: float32
        ``[batch, heads, entries]``; not to be changed in place."""
        if last not in self.known:
            self.known[last] = self.attention(last).mean((2, 3))
        return self.known[last]


class Merged(NamedTuple):
    """The entries of a layer after those to be removed have been merged into others.

    Attributes:
        keys, values: ``[batch, heads, entries, width]``, of all entries, those to be removed included.
        carried: ``[batch, ...]``, state for the next removal from the layer; None for nothing.
        weights: float32 ``[batch, heads, entries]``, how many tokens each entry stands for; None if each is one token.
    """

    keys: Tensor
    values: Tensor
    carried: Tensor | None = None
    weights: Tensor | None = None


class Needs(NamedTuple):
    """What must be recorded for a policy, besides keys, values and its ``window`` of last queries.

    Attributes:
        attention: attention of all queries, summed; ``decay``: the factor applied to the sums for every further query.
        moments: mean and covariance of the queries.
        rotations: how keys are rotated.
    """

    attention: bool = False
    decay: float = 1.0
    moments: bool = False
    rotations: bool = False


@dataclass(frozen=True)
class CachePolicy(Method):
    """A method that scores entries and keeps those with the highest scores.

    Attributes:
        needs: what must be recorded for it.
        shares_heads: whether all heads of a layer keep the same entries.
        step, prefill: options of every policy.
        window: number of last queries that it uses; ``sinks``: number of first tokens that it always keeps. They are
            options only where a policy declares them so.
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
        """Check that more sinks than by default have room: they are always kept, and the ratio would not be met."""
        sinks = self.options().get("sinks")
        if sinks is not None and self.sinks > int(sinks.default):
            check_room(self, n, "sinks", "the ratio would not be met")

    @property
    def rerotated(self) -> int:
        """How many of the first keys are re-rotated to their index in the cache (StreamingLLM)."""
        return 0

    @property
    def counts_anew(self) -> bool:
        return self.rerotated > 0

    @property
    def packs(self) -> bool:
        """Whether nothing is removed, and older entries are stored in a smaller form."""
        return self.effect is Effect.PACKS

    @property
    def keeps_all(self) -> bool:
        """Whether entries that are not chosen stay, unattended until the next step with full attention."""
        return self.effect is Effect.ATTENDS_LESS

    @property
    def merges(self) -> bool:
        """Whether removed entries are merged into those that stay."""
        return type(self).merged is not CachePolicy.merged

    @property
    def weighs(self) -> bool:
        """Whether an entry that stands for n tokens takes n times the attention: log n is added to its logit."""
        return False

    @property
    def observes(self) -> bool:
        """Whether the policy uses queries."""
        return bool(self.window or self.needs.attention or self.needs.moments)

    @property
    def minimum(self) -> int:
        return self.sinks + 1

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        """Number of entries that a layer keeps after ``read`` of ``total`` tokens.

        Sinks are kept from the start, however few tokens have been read, since a removed entry cannot return.
        """
        return read if self.packs else min(read, max(self.sinks + 1, self.held_after(read)))

    def constant(self, total: int) -> int:
        """Size of a cache that does not grow: the budget in tokens if given, else kept(N, r) of N tokens."""
        return max(self.minimum, self.budget_tokens or kept(total, self.ratio))

    def held_after(self, read: int) -> int:
        """Mean number of entries per layer after ``read`` tokens: kept(read, r), or up to the budget in tokens."""
        return min(read, self.budget_tokens) if self.budget_tokens else kept(read, self.ratio)

    def patched(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context manager around the model's forward passes, for policies that change what it computes."""
        return nullcontext()

    def since_boundary(self, targets: Tensor) -> Tensor | None:
        """None: entries are removed at many places (compare :meth:`Layout.since_boundary`)."""
        return None

    def run_length(self, read: int) -> int:
        """Number of tokens that are fed at a time if entries are removed while a context is read."""
        return self.step

    def is_due(self, read: int, since: int) -> bool:
        """Whether to remove entries now, ``since`` tokens after the last removal."""
        return since >= self.step

    def is_full_step(self, read: int) -> bool:
        """Whether the next step uses full attention (RefreshKV)."""
        return False

    def follows(self, layer: int) -> int:
        """The layer whose choice this layer takes over; the layer itself if it makes its own."""
        return layer

    def scores(self, view: LayerView) -> Tensor:
        """float ``[batch, heads, entries]``: the score of each entry; infinite for entries that must be kept.

        By default later entries score higher, and the sinks are kept.
        """
        return protect_first(view.positions.float(), view.positions, self.sinks)

    def chosen(self, view: LayerView, keep: int) -> Tensor:
        """Indices of the entries to keep: int64 ``[batch, heads, keep]``, ascending."""
        scores = self.scores(view).float()
        if scores.shape != view.keys.shape[:-1]:
            code = inspect.unwrap(type(self).scores).__code__
            raise UserError(
                f"scores of {self.name} ({code.co_filename}, line {code.co_firstlineno}) have the shape "
                f"{list(scores.shape)}, and {list(view.keys.shape[:-1])} was expected.",
                "A score for each entry: [batch, KV heads, entries].",
            )
        if self.shares_heads:
            scores = scores.mean(1, keepdim=True).expand_as(scores)
        return highest(scores, keep)

    def merged(self, view: LayerView, entries: Tensor) -> Merged:
        """Return all entries, with removed ones merged into the kept ``entries``; by default nothing is merged."""
        return Merged(view.keys, view.values)

    def pack(self, view: LayerView, earlier: tuple[StoredEntries, ...]) -> tuple[StoredEntries, int] | None:
        """Pack the first entries: their packed form, and how many they are; None if there are none to pack yet.

        Args:
            view: the unpacked entries.
            earlier: what has been packed before.
        """
        return None


def highest(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` highest scores, ascending; of equal scores the last are taken."""
    least = scores.kthvalue(scores.shape[-1] - keep + 1, dim=-1, keepdim=True).values
    chosen = scores >= least
    if int(chosen.sum()) > keep * scores[..., 0].numel():  # more scores equal the lowest kept one than fit
        above = scores > least
        place = keep - above.sum(-1, keepdim=True)
        last = (scores == least).flip(-1).cumsum(-1).flip(-1) <= place
        chosen = above | (chosen & last)
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], keep)


def protect_last(scores: Tensor, count: int) -> Tensor:
    """Scores with the last ``count`` entries set to infinity."""
    recent = torch.arange(scores.shape[-1], device=scores.device) >= scores.shape[-1] - count
    return scores.masked_fill(recent, float("inf"))


def protect_first(scores: Tensor, positions: Tensor, count: int) -> Tensor:
    """Scores with the first ``count`` tokens of the text, as far as they are still held, set to infinity."""
    return scores.masked_fill(positions < count, float("inf"))


def check_room(policy: CachePolicy, n: int, name: str, otherwise: str) -> None:
    """Check that what is kept of ``n`` entries has room for what an option protects, and for one more.

    Raises:
        UserError: it has not; ``otherwise`` is what the message gives as the consequence.
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
    """Check that a pooling kernel can be centred.

    Raises:
        UserError: its size is even.
    """
    if kernel % 2 == 0:
        raise UserError(f"--set kernel={kernel} has no middle.", "Give an odd number of places.")


def removed_mask(view: LayerView, entries: Tensor) -> Tensor:
    """bool ``[batch, heads, entries]``: True for entries that are removed."""
    return torch.ones_like(view.positions, dtype=torch.bool).scatter_(-1, entries, False)
