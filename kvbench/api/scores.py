"""How probable a text is to a compressed model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.inference.compressed_cache import Compression, seed_of
from kvbench.inference.opening import Text, open_session, rows_together
from kvbench.inference.row_group import CacheUsage, RowGroup

NO_TARGET = -100
"""In place of a target: nothing is scored there."""
CHUNK = 64
"""Tokens that are read at a time while a text is scored alone, unless nothing is removed; as in runs."""


@dataclass(frozen=True)
class Scores:
    """How probable every target was.

    Attributes:
        log_likelihood: float64 ``[batch, n]``, in nats; 0 where there is no target.
        is_best: bool ``[batch, n]``, whether the target was the most probable token.
        usage: what the cache holds afterwards.
    """

    log_likelihood: Tensor
    is_best: Tensor
    usage: CacheUsage

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, usage: CacheUsage) -> Scores:
        """Scores from logits ``[batch, n, vocabulary]`` behind each token."""
        return cls(*_scored(logits, targets), usage)


def score_alone(compression: Compression, ids: Tensor, targets: Tensor) -> Scores:
    """Score texts ``[batch, n]`` while they are read and compressed; the model is prepared for them."""
    groups, setting, n = [], compression, ids.shape[1]
    likelihood = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    is_best = torch.zeros_like(ids, dtype=torch.bool)
    seeds = [seed_of(text) for text in ids]
    for rows in rows_together(setting.method, seeds):
        mine = tuple(seeds[row] for row in rows)
        session = open_session(
            setting.model, setting.method, Text(n, n, mine), adapter=setting.adapter, seed=setting.seed, chunk=CHUNK,
            at_once=True,
        )
        for part in session.prefill(ids[rows]):
            here = slice(part.start, part.stop)
            likelihood[rows, here], is_best[rows, here] = _scored(part.logits, targets[rows, here])
        groups.append(RowGroup(torch.tensor(rows, device=ids.device), session, n, mine))
    return Scores(likelihood, is_best, CacheUsage.over([group.usage(0) for group in groups]))


def _scored(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    is_target = targets != NO_TARGET
    chosen = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chosen.double() * is_target, (logits.argmax(-1) == targets) & is_target
