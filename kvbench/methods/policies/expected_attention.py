"""Expected Attention (arXiv 2510.00636): entries that future queries are expected to attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView, Needs, protect_first
from kvbench.models.rope import rotated


@dataclass(frozen=True)
class ExpectedAttention(CachePolicy):
    """Keeps the entries most attended by normally distributed queries with the mean and covariance of those so far.

    Statistics are of queries before the rotary embedding, without the ``sinks`` first tokens, which are kept; mean and
    covariance are then rotated by the average rotation of the ``future`` next positions. An entry's score is the
    softmax of the expected logit plus half its variance, averaged over the query heads, times the norm of its value.
    Statistics are updated while text is read and generated; the published code takes those of the prompt. With learned
    positions, nothing is rotated.
    """

    name = "expected-attention"
    summary = "the entries that queries like those so far are expected to attend most"
    paper = "arXiv 2510.00636"
    needs = Needs(moments=True)

    sinks: int = option(4, "first entries that stay, and are not averaged over", least=1)
    future: int = option(512, "places ahead that rotations are averaged over", least=1)

    def scores(self, view: LayerView) -> Tensor:
        norms = view.values.float().norm(dim=-1)
        if view.query_moments is None or view.query_moments[0] == 0:  # nothing has been read after the sinks
            return protect_first(norms, view.positions, self.sinks)
        mean, covariance = self._rotated_statistics(view)
        batch, heads, _, width = view.keys.shape
        keys = view.keys.float()[:, :, None]
        mean = mean.reshape(batch, heads, -1, width, 1)
        covariance = covariance.reshape(batch, heads, -1, width, width)
        logits = (keys @ mean)[..., 0] * view.scaling
        logits = logits + ((keys @ covariance) * keys).sum(-1) * (view.scaling**2 / 2)
        first = (view.positions < self.sinks)[:, :, None]
        expected = logits.masked_fill(first, float("-inf")).softmax(-1).mean(2)
        return protect_first(expected * norms, view.positions, self.sinks)

    def _rotated_statistics(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Mean ``[batch, query heads, width]`` and covariance of the queries, rotated to the coming positions."""
        assert view.query_moments is not None
        count, total, squares = view.query_moments
        mean = total / count
        covariance = squares / count - mean[..., :, None] * mean[..., None, :]
        if view.inv_freq is None:
            return mean, covariance
        places = torch.arange(view.read, view.read + self.future, device=mean.device)
        angles = places[:, None] * view.inv_freq.to(mean.device)
        cosine, sine = angles.cos().mean(0), angles.sin().mean(0)
        covariance = rotated(rotated(covariance, cosine, sine).transpose(-1, -2), cosine, sine)
        return rotated(mean, cosine, sine), covariance
