"""Scoring a batch of pieces under a policy, with what it removes really removed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kvbench.inference.policy_session import Policing
from kvbench.methods.policies.policy import Policy, View
from kvbench.models.rope import fixed_rotations
from kvbench.protocols.pieces import Piece
from kvbench.protocols.scoring import BatchScore, Reference, Rows


def score_policed(
    model: nn.Module, policy: Policy, pieces: list[Piece], reference: Reference | None, chunk: int, seed: int
) -> BatchScore:
    """Read a batch of pieces (equal ``shape``) under a policy and score its targets.

    A context that is used afterwards (prefix, recall) is compressed once, when it has been read, unless the policy is
    told to do it block by block; what is scored while it is read (block, stream) loses entries after every ``step``
    tokens. A policy that looks at queries has then seen those of ``Piece.ahead`` further tokens as well.

    Args:
        chunk: tokens of a context fed at a time, where it is compressed once.
    """
    first = pieces[0]
    ids = torch.tensor([piece.ids for piece in pieces], device=next(model.parameters()).device)
    once = first.context < len(first.ids) and policy.option("prefill") == "once"
    rows = Rows(ids[:, first.scored :], first.scored, reference, keep=False)
    with torch.inference_mode(), fixed_rotations(model, len(first.ids)):
        run = Informed(
            model, policy, first.context, [piece.layout for piece in pieces], seed,
            ahead=ids[:, first.context : first.context + (first.ahead if once else 0)],
        )
        for part in run.stream(ids[:, : first.context], first.scored - 1, chunk if once else None):
            rows.add(part.start, part.logits)
        held = run.cache.mean_entries()
        sizes = run.cache.logical_bytes(), run.cache.physical_bytes(), first.context * run.cache.entry_bytes()
        for part in run.follow(ids[:, first.context : -1]):
            rows.add(first.context + part.start, part.logits)
    queries = torch.arange(max(1, first.scored - 1), len(first.ids) - 1)
    seen = torch.tensor(run.seen, dtype=torch.float64)[queries]
    return rows.score(
        since=None, position=torch.arange(first.scored, len(first.ids)), visible=float((seen / queries).sum()),
        queries=len(queries),
        held=round(held), peak=run.peak, sizes=sizes,
    )


@dataclass
class Informed(Policing):
    """A run under a policy that has seen the queries of what follows the context when it chooses.

    They attend the whole context, as all queries before them do, and their own entries are let go of again: what
    follows is then read anew, from what is left.

    Attributes:
        ahead: ids ``[batch, m]`` that follow the context.
    """

    ahead: Tensor = field(kw_only=True)
    is_ahead: bool = field(default=False, init=False)

    def remove(self) -> None:
        looks = self.policy.looks_at or self.policy.sums or self.policy.takes_moments
        self.is_ahead = bool(looks) and self.read == self.total and self.ahead.shape[1] > 0
        if self.is_ahead:
            self._look_ahead()
        super().remove()
        self.is_ahead = False

    def _look_ahead(self) -> None:
        count = self.ahead.shape[1]
        self.feed(self.ahead, slice(0, 0))
        for number, layer in enumerate(self.cache.layers):
            self._observe(number, None)
            layer.forget(count)
        self.read -= count
        del self.seen[-count:]

    def _view(self, number: int, first: int = 0, last: int | None = None) -> View:
        view = super()._view(number, first, last)
        queries_are_ahead = self.is_ahead and view.queries is not None
        return replace(view, read=view.read + self.ahead.shape[1]) if queries_are_ahead else view
