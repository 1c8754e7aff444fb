"""Choosing the next token: greedy decoding, or nucleus sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Parameters of nucleus sampling.

    Attributes:
        top_p: probability of the nucleus, the smallest set of most probable tokens that reaches it (nucleus sampling,
            arXiv 1904.09751).
        temperature: logits are divided by it.
    """

    top_p: float = 0.9
    temperature: float = 1.0


def choose(logits: Tensor, uniforms: Tensor, sampling: Sampling, drawn: Tensor | None = None) -> Tensor:
    """The next token of every row.

    Args:
        logits: ``[rows, vocabulary]``.
        uniforms: float64 ``[rows]`` in [0, 1); a row with NaN is greedy.
        drawn: int64, the rows that are sampled; computed here if None, which synchronises with a GPU.

    Returns:
        int64 ``[rows]``.
    """
    best = logits.argmax(-1)
    drawn = torch.nonzero(~uniforms.isnan()).flatten() if drawn is None else drawn
    if len(drawn):
        p = (logits[drawn].double() / sampling.temperature).softmax(-1)
        best[drawn] = _inverted(_nucleus(p, sampling.top_p), uniforms[drawn])
    return best


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """Probabilities with those outside the nucleus set to 0; the most probable token is always inside."""
    ordered, index = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    inside = (before < top_p).scatter(-1, index, before < top_p)
    return p * inside


def _inverted(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse transform sampling: the first id at which the cumulative weight exceeds that share of the total."""
    total = weights.cumsum(-1)
    place = torch.searchsorted(total, uniforms[:, None] * total[:, -1:], right=True)[:, 0]
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(place, last)  # a uniform just below 1 may be rounded up to the total
