"""ComprExIT (arXiv 2602.03784): hidden states of all layers, moved to a few slots by optimal transport."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvbench.errors import UserError
from kvbench.methods.memories.memory import Memory
from kvbench.methods.memories.writer import ParallelWriter, all_states
from kvbench.models.embeddings import spread_of

TEMPERATURE = 0.7
"""Of the weights of layers."""
EPSILON, ITERATIONS = 0.1, 30
"""Of the transport: strength of its entropy, and Sinkhorn iterations."""
UNIFORM = 0.05
"""Share of a token's mass that does not depend on the token."""
GATE = 64
"""Width of the queries and keys that weigh layers."""


def transport(cost: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The plan ``[batch, c, k]`` that moves masses ``[batch, c]`` to masses ``[batch, k]`` at a cost of that shape,
    with an entropy of strength :data:`EPSILON`; float32, in logarithms."""
    scores, log_source, log_target = -cost / EPSILON, source.log(), target.log()
    right = torch.zeros_like(log_target)
    left = torch.zeros_like(log_source)
    for _ in range(ITERATIONS):
        left = log_source - (scores + right[:, None]).logsumexp(2)
        right = log_target - (scores + left[..., None]).logsumexp(1)
    return (scores + left[..., None] + right[:, None]).exp()


class TransportWriter(ParallelWriter):
    """Weighs the layers of every token, then moves the tokens to ``k`` anchors by optimal transport."""

    def __init__(self, model: nn.Module, k: int) -> None:
        super().__init__()
        spread = spread_of(model)
        width = len(spread.mean)
        device = next(model.parameters()).device
        with torch.no_grad():
            states = all_states(model, torch.zeros(1, 1, dtype=torch.long, device=device))
        layers = len(states)
        if states.shape[-1] != width:
            raise UserError(
                f"{type(model).__name__} has embeddings of another width than its layers, which comprexit mixes.",
                "Use icae.",
            )
        self.k = k
        self.mixture = nn.Parameter(torch.zeros(layers))
        self.by_layer = nn.Parameter(0.02 * torch.randn(layers, GATE))
        self.query, self.key = nn.Linear(width, GATE), nn.Linear(width, GATE)
        self.value, self.place = nn.Linear(width, width), nn.Linear(width, width)
        self.mass = nn.Linear(width, 1, bias=False)
        self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.scale = nn.Parameter(spread.overall)

    def read(self, model: nn.Module, ids: Tensor) -> Tensor:
        states = all_states(model, ids)
        states = functional.layer_norm(states, states.shape[-1:])  # inner layers are far wider than embeddings
        moved = self.moved(self.values(states))
        rows = self.projector(moved)
        return self.scale * functional.layer_norm(rows, rows.shape[-1:])

    def values(self, states: Tensor) -> Tensor:
        """``[batch, c, width]``: each token's weighted sum over layers of states ``[layers, batch, c, width]``."""
        query = self.query((self.mixture.softmax(0)[:, None, None, None].to(states.dtype) * states).sum(0))
        keys = self.key(states) + self.by_layer[:, None, None]
        weights = ((query * keys).sum(-1) / (math.sqrt(GATE) * TEMPERATURE)).softmax(0)
        found: Tensor = (weights[..., None] * self.value(states)).sum(0)
        return found

    def moved(self, values: Tensor) -> Tensor:
        """``[batch, k, width]``: the mean of the tokens moved to each anchor, anchors being means of equal runs."""
        with torch.autocast(values.device.type, enabled=False):
            plan = self.plan(values.float())
            return (plan.transpose(1, 2) @ values.float() * self.k).to(values.dtype)

    def plan(self, values: Tensor) -> Tensor:
        """The plan ``[batch, c, k]`` of float32 values ``[batch, c, width]``; it sums to 1."""
        count = values.shape[1]
        firsts = [min(count * i // self.k, count - 1) for i in range(self.k)]
        anchors = torch.stack([
            values[:, first : max(first + 1, count * (i + 1) // self.k)].mean(1) for i, first in enumerate(firsts)
        ], 1)
        tokens, anchors = (
            functional.normalize(functional.linear(x, self.place.weight.float(), self.place.bias.float()), dim=-1)
            for x in (values, anchors)
        )
        score = functional.linear(values, self.mass.weight.float())[..., 0]
        source = (1 - UNIFORM) * score.softmax(1) + UNIFORM / count
        target = source.new_full((len(values), self.k), 1 / self.k)
        return transport(1 - tokens @ anchors.transpose(1, 2), source, target)


@dataclass(frozen=True)
class ComprExIT(Memory):
    """Replaces each chunk by ``n_comp`` rows: hidden states of all layers of the frozen model, mixed per token, and
    moved to the means of equal runs by entropic optimal transport.

    Every token weighs its layers by attention (temperature 0.7); tokens have a learnt mass (0.05 of it uniform), slots
    an equal one; the cost is 1 - cosine of a projection; 30 Sinkhorn iterations at 0.1; a projector of two layers
    follows.

    Departures from the released code: states are normalised first and rows brought to the spread of embeddings; the
    cost of positions, which the released code computes and does not use, is left out; chunks are short (set by the
    ratio) instead of 128 tokens; queries and keys over layers are 64 wide instead of 256; places as for ``icae``.
    """

    name = "comprexit"
    summary = "rows made of each chunk's hidden states in all layers, by optimal transport"
    paper = "arXiv 2602.03784"

    def new_writer(self, model: nn.Module) -> TransportWriter:
        return TransportWriter(model, self.n_comp)
