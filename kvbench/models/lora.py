"""LoRA with a gate: the low-rank update of a linear layer acts on chosen tokens only.

If the gate selects special tokens only, text tokens use the base weights alone, so that an adapted
model without special tokens equals the base model, bit for bit. If it selects all tokens, this is
plain LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvbench.errors import UserError


@dataclass
class Gate:
    """Which tokens of the current input the low-rank update acts on.

    Attributes:
        slots: int64 indices in the fed sequence; None for all tokens.
    """

    slots: Tensor | None


class LowRank(nn.Module):
    """The matrices A ``[rank, in]`` and B ``[out, rank]`` of one linear layer; B is initialised to zero."""

    def __init__(self, fan_in: int, fan_out: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, fan_in))
        self.b = nn.Parameter(torch.zeros(fan_out, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))


class GatedLinear(nn.Module):
    """``base(x) + scale * x A^T B^T`` for tokens that the gate selects, ``base(x)`` for the others."""

    def __init__(self, base: nn.Module, pair: LowRank, scale: float, dropout: float, gate: Gate):
        super().__init__()
        self.base = base
        self.pair = pair
        self.scale = scale
        self.dropout = dropout
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        slots = self.gate.slots
        if slots is not None and slots.numel() == 0:
            return y
        chosen = x if slots is None else x.index_select(1, slots)
        chosen = functional.dropout(chosen, self.dropout, self.pair.training)
        added = self.scale * (chosen @ self.pair.a.T @ self.pair.b.T)
        if slots is None:
            return y + added
        return y.index_add(1, slots, added.to(y.dtype))


def attention_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers directly inside attention modules, by path.

    They are found by structure (a class named ``*Attention`` with a ``layer_idx``), so that one rule
    covers Llama, Qwen, Mistral, GPT-NeoX, OPT and GPT-2.

    Raises:
        UserError: the model has no such layers.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
            for name, child in module.named_children():
                weight = getattr(child, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2:
                    found[f"{path}.{name}"] = child
    if not found:
        raise UserError(
            f"{type(model).__name__} has no attention projections that an adapter could act on.",
            "Choose a decoder-only transformer, or a method that needs no adapter.",
        )
    return found


def fan(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer; GPT-2's ``Conv1D`` stores its weight transposed."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if hasattr(linear, "nf") else (columns, rows)


@contextmanager
def with_weights(model: nn.Module, weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """Replace parameters by name for the length of the block; tied parameters are replaced together."""
    names: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
    places = [
        (module, leaf, parameter)
        for module in model.modules() for leaf, parameter in module._parameters.items() if parameter is not None
    ]
    try:
        for module, leaf, parameter in places:
            module._parameters[leaf] = weights.get(names[id(parameter)], parameter)
        yield
    finally:
        for module, leaf, parameter in places:
            module._parameters[leaf] = parameter


@contextmanager
def swapped(model: nn.Module, replacements: dict[str, nn.Module]) -> Iterator[None]:
    """Replace modules by path for the length of the block; the originals are always restored."""
    originals = {path: model.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)
