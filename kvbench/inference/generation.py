"""The decoding loop: the model continues the text that a session has read.

The loop is the same for every method: the session decides which special tokens (sentinels, memory tokens) are fed
besides the text, and which entries leave the cache, those of generated tokens included. All random numbers are drawn
before the loop, one per row and token, and used by inverse transform sampling. So a row does not depend on the batch or
its order, and all methods use the same random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from kvbench.inference.sampling import Sampling, choose
from kvbench.inference.session import Session


class Rows(Protocol):
    """What text is written in: a session, or the rows of several."""

    def expand(self, copies: int) -> None:
        """Repeat every row ``copies`` times, copies of a row next to each other."""

    def step(self, ids: Tensor) -> Tensor:
        """Read one generated token per row, int64 ``[rows]``, and return logits ``[rows, vocabulary]``."""


def read_prompt(session: Session, ids: Tensor) -> Tensor:
    """Read the context ``[batch, P]`` and return logits ``[batch, vocabulary]`` for the first token to generate."""
    *_, part = session.prefill(ids, ids.shape[1] - 1)
    return part.logits[:, -1]


def generate(
    session: Rows, logits: Tensor, uniforms: Tensor, sampling: Sampling, ends: tuple[int, ...] = (),
    check: bool = True,
) -> Iterator[Tensor]:
    """Generate tokens: yields their ids, int64 ``[batch * outputs]``, step by step; -1 in rows that have ended.

    Args:
        logits: ``[batch, vocabulary]``, for the first token.
        uniforms: float64 ``[batch, outputs, G]``, uniform random numbers for G tokens; all NaN for a greedy output.
        ends: token ids after which a row has ended.
        check: check at the end that all logits were finite.

    Raises:
        RuntimeError: they were not.
    """
    batch, outputs, steps = uniforms.shape
    if outputs > 1:
        session.expand(outputs)
        logits = logits.repeat_interleave(outputs, dim=0)
    device = logits.device
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    drawn = torch.nonzero(~uniforms.flatten(0, 1)[:, 0].isnan()).flatten().to(device)
    uniforms = uniforms.flatten(0, 1).to(device)
    ended = torch.zeros(batch * outputs, dtype=torch.bool, device=device)
    end_ids = torch.tensor(ends, dtype=torch.long, device=device)
    for step in range(steps):
        is_finite &= torch.isfinite(logits).all()
        ids = choose(logits, uniforms[:, step], sampling, drawn)
        yield ids.masked_fill(ended, -1)
        if ends:
            ended |= torch.isin(ids, end_ids)
            if bool(ended.all()):
                break
        if step + 1 < steps:
            logits = session.step(ids)
    if check and not bool(is_finite):
        raise RuntimeError("the model's predictions are not finite (overflow, or damaged weights)")


def greedy(batch: int, tokens: int) -> Tensor:
    """The ``uniforms`` of one greedy output per text."""
    return torch.full((batch, 1, tokens), torch.nan, dtype=torch.float64)
