"""Scoring a batch of pieces under a policy, with what it removes really removed."""

from __future__ import annotations

import torch
from torch import nn

from kvbench.methods.policy import Policy
from kvbench.models.rotary import fixed_rotations
from kvbench.policing import Policing
from kvbench.protocols.cut import Piece
from kvbench.protocols.score import BatchScore, Reference, Rows


def score_policed(
    model: nn.Module, policy: Policy, pieces: list[Piece], reference: Reference | None, chunk: int, seed: int
) -> BatchScore:
    """Read a batch of pieces (equal ``shape``) under a policy and score its targets.

    A context that is used afterwards (prefix, recall) is compressed once, when it has been read, unless the policy is
    told to do it block by block; what is scored while it is read (block, stream) loses entries after every ``step``
    tokens.

    Args:
        chunk: tokens of a context fed at a time, where it is compressed once.
    """
    first = pieces[0]
    ids = torch.tensor([piece.ids for piece in pieces], device=next(model.parameters()).device)
    once = first.context < len(first.ids) and policy.option("prefill") == "once"
    rows = Rows(ids[:, first.scored :], first.scored, reference, keep=False)
    with torch.inference_mode(), fixed_rotations(model, len(first.ids)):
        run = Policing(model, policy, first.context, [piece.layout for piece in pieces], seed)
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

