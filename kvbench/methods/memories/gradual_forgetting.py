"""Gradual Forgetting (arXiv 2510.22109): the past as means of its embeddings over ever longer spans of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvbench.errors import UserError
from kvbench.methods.layouts.chunks import LONGEST, SHORTEST
from kvbench.methods.memories.memory import Memory
from kvbench.methods.memories.recurrent import check_segment
from kvbench.methods.memories.writer import State, Writer, embedded
from kvbench.methods.options import option

REACH = 3
"""Ages up to this multiple of the longest time are remembered; what lies beyond has next to no weight."""


def kernel(age: Tensor, tau: Tensor, order: int) -> Tensor:
    """The weight of a token of that age for a row whose weights peak at ``tau``: (1/tau) k^(k+1)/k! (t/tau)^k e^(-k
    t/tau), k being the order; its integral over all ages is 1."""
    x = age / tau
    log = (order + 1) * math.log(order) - math.lgamma(order + 1) + order * (x.log() - x) - tau.log()
    return log.exp()


class FadingWriter(Writer):
    """Weighted means of the embeddings of all text so far, one for each of ``k`` times; the state is its token ids."""

    def __init__(self, k: int, nearest: int, farthest: int, order: int) -> None:
        super().__init__()
        step = (farthest / nearest) ** (1 / max(1, k - 1))
        self.times = tuple(nearest * step**i for i in range(k))
        self.order, self.reach = order, REACH * farthest
        self.scale = nn.Parameter(torch.ones(k))

    def begin(self, batch: int) -> State:
        return (torch.zeros(batch, 0, dtype=torch.int32, device=self.scale.device),)

    def write(self, model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
        known = torch.cat([state[0], ids.int()], 1)[:, -self.reach :]
        age = torch.arange(known.shape[1], 0, -1, device=ids.device, dtype=torch.float32)
        # Oldest times first, as the text that they stand for.
        times = torch.tensor(self.times[::-1], device=ids.device)
        weights = kernel(age, times[:, None], self.order)
        text = embedded(model, known.long())
        return self.scale[:, None] * (weights.to(text.dtype) @ text), (known,)


@dataclass(frozen=True)
class GradualForgetting(Memory):
    """Keeps ``n_comp`` rows in all, means of the embeddings of all past text; older text is blurred over more time.

    Row i weighs a token of age t by a kernel that peaks at tau_i; the tau_i are a geometric series from ``nearest`` to
    ``farthest``. After every segment all rows are made anew of the token ids read so far, up to three times
    ``farthest``, which are held and counted (4 bytes each).

    The paper's text was not at hand: this follows its abstract, and the kernel of the SITH layers (scale-invariant
    temporal history) that its figures name. Rows are fed as embeddings before the current segment, with one
    trained scale each; ``adapter=plain`` adds LoRA, since the published models were trained on such input.
    """

    name = "gradual-forgetting"
    summary = "rows that are means of all past embeddings, over ever longer spans of time"
    paper = "arXiv 2510.22109"
    budgets = ()
    adapter_kinds = ("plain", "writer")
    is_latest = True

    nearest: int = option(4, "age in tokens at which the first row's weights peak", least=1, most=4096, trained=True)
    farthest: int = option(512, "the same of the last row", least=1, most=65536, trained=True)
    order: int = option(8, "sharpness k of the kernel", least=1, most=100, trained=True)
    segment: int = option(64, "tokens of a chunk of running text", least=SHORTEST, most=LONGEST)

    def chunk(self) -> int:
        return self.segment

    def check(self, longest: int, in_chunks: bool) -> None:
        check_segment(self.name, self.n_comp, self.segment, in_chunks)
        super().check(longest, in_chunks)

    def check_options(self) -> None:
        if self.farthest < self.nearest:
            raise UserError(
                f"{self.name}: --set farthest={self.farthest} lies before nearest={self.nearest}.", "Exchange them."
            )

    def positions_read(self, chunks: Sequence[int]) -> int:
        return 0

    def new_writer(self, model: nn.Module) -> FadingWriter:
        return FadingWriter(self.n_comp, self.nearest, self.farthest, self.order)
