"""How the input embeddings of a model are spread, as its layers are fed them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_FEW = 16
"""Number of embeddings that the factor of a model is read from."""


class Spread(NamedTuple):
    """Statistics of input embeddings, float32 on the CPU: mean and standard deviation of each column ``[width]``, and
    the standard deviation of all numbers together."""

    mean: Tensor
    by_column: Tensor
    overall: Tensor


@torch.no_grad()
def spread_of(model: nn.Module) -> Spread:
    """Measure what layers are fed: some models multiply their table of embeddings by a number where it is looked up."""
    module: Any = model.get_input_embeddings()  # type: ignore[operator]
    table: Tensor = module.weight
    few = table[:_FEW].float()
    fed = module(torch.arange(len(few), device=table.device)).float()
    factor = float(fed.norm() / few.norm()) if bool(few.any()) else 1.0
    values = table.detach().float()
    return Spread(*(factor * one.cpu() for one in (values.mean(0), values.std(0), values.std())))
