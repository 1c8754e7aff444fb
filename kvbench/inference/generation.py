"""The decoding loop: the model writes on behind what a session has read.

The loop is the same for every method: the session says what is fed besides the text (sentinels, memory tokens) and
what leaves the cache, also among what is being written. Every random number is drawn before the loop, one per row and
token, and used by inverting the cumulative distribution, so that neither the batch nor its order decides what a row
becomes, and methods share their luck.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvbench.inference.sampling import Sampling, choose
from kvbench.inference.session import Session


def read_prompt(session: Session, ids: Tensor) -> Tensor:
    """Read the context ``[batch, P]``: logits ``[batch, vocabulary]`` of the first token to write."""
    *_, part = session.prefill(ids, ids.shape[1] - 1)
    return part.logits[:, -1]


def written(
    session: Session, logits: Tensor, uniforms: Tensor, sampling: Sampling, ends: tuple[int, ...] = (),
    check: bool = True,
) -> Iterator[Tensor]:
    """Choose, feed, choose ...: yields ids int64 ``[batch * outputs]``, -1 in rows that have ended.

    Args:
        logits: ``[batch, vocabulary]``, of the first token.
        uniforms: float64 ``[batch, outputs, G]``, NaN throughout for a greedy output.
        ends: ids after which a row has ended.
        check: see, at the end, that all predictions were finite.

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
