"""Expected Attention (arXiv 2510.00636): what the queries to come are expected to attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.base import Option
from kvbench.methods.policies.policy import Policy, View, protect_first
from kvbench.models.rope import rotated


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Holds the entries that normal queries with the mean and covariance of those so far would attend most.

    Queries are averaged before they are rotated, from the ``sinks`` first tokens on, which stay; the mean is turned
    by the average rotation of the ``future`` next places. An entry's score is the softmax of the expected logit and
    half its variance, averaged over the query heads, times the norm of its value. Moments go on being taken while
    text is read and written; the published code takes those of the prompt. Where positions are learnt, nothing is
    rotated.
    """

    name = "expected-attention"
    summary = "the entries that queries like those so far are expected to attend most"
    paper = "arXiv 2510.00636"
    takes_moments = True
    known = Policy.known | {"sinks": Option("4", least=1), "future": Option("512", least=1)}

    def scores(self, view: View) -> Tensor:
        norms = view.values.float().norm(dim=-1)
        if view.moments is None or view.moments[0] == 0:  # nothing has been read behind the sinks
            return protect_first(norms, view.positions, self.sinks)
        mean, covariance = self._turned(view)
        batch, heads, _, width = view.keys.shape
        keys = view.keys.float()[:, :, None]
        mean = mean.reshape(batch, heads, -1, width, 1)
        covariance = covariance.reshape(batch, heads, -1, width, width)
        logits = (keys @ mean)[..., 0] * view.scaling
        logits = logits + ((keys @ covariance) * keys).sum(-1) * (view.scaling**2 / 2)
        first = (view.positions < self.sinks)[:, :, None]
        expected = logits.masked_fill(first, float("-inf")).softmax(-1).mean(2)
        return protect_first(expected * norms, view.positions, self.sinks)

    def _turned(self, view: View) -> tuple[Tensor, Tensor]:
        """Mean ``[batch, query heads, width]`` and covariance of the queries, at the average of the coming places."""
        assert view.moments is not None
        count, total, squares = view.moments
        mean = total / count
        covariance = squares / count - mean[..., :, None] * mean[..., None, :]
        if view.speeds is None:
            return mean, covariance
        places = torch.arange(view.read, view.read + self.number("future"), device=mean.device)
        angles = places[:, None] * view.speeds.to(mean.device)
        cosine, sine = angles.cos().mean(0), angles.sin().mean(0)
        turned = rotated(rotated(covariance, cosine, sine).transpose(-1, -2), cosine, sine)
        return rotated(mean, cosine, sine), turned
