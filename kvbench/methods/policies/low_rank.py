"""Replaces a model's key and value projections by low-rank ones, within a context manager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvbench.cache.shape import cache_shape
from kvbench.errors import UserError

_FOUND: WeakKeyDictionary[nn.Module, list[Part]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Part:
    """The columns of a projection's output that are keys, or values.

    Attributes:
        module: the projection.
        columns: int64 ``[heads * width]``.
        basis: left singular vectors of the weights ``[heads * width, heads * width]``, by descending singular value.
        bias: ``[heads * width]``; None if there is none.
    """

    module: nn.Module
    columns: Tensor
    basis: Tensor
    bias: Tensor | None

    def reduced(self, output: Tensor, rank: int) -> Tensor:
        """The output as if the weights of these columns were replaced by their best approximation of that rank."""
        if rank >= len(self.columns):
            return output
        mine = output[..., self.columns].float()
        mine = mine if self.bias is None else mine - self.bias
        basis = self.basis[:, :rank]
        low = mine @ basis @ basis.T
        low = low if self.bias is None else low + self.bias
        return output.index_copy(-1, self.columns, low.to(output.dtype))


@contextmanager
def low_rank(model: nn.Module, rank: int) -> Iterator[None]:
    """Compute keys and values with weights of that rank, over all heads of a layer together, within the block.

    Raises:
        UserError: the model's key and value projections are not known.
    """
    if model not in _FOUND:
        _FOUND[model] = list(_parts(model))

    with ExitStack() as stack:
        for part in _FOUND[model]:
            def hook(module: nn.Module, inputs: Any, output: Tensor, part: Part = part) -> Tensor:
                return part.reduced(output, rank)

            stack.callback(part.module.register_forward_hook(hook).remove)
        yield


def columns_of(model: nn.Module) -> int:
    """Width of a layer's keys over all heads, which is that of its values as well.

    Raises:
        UserError: widths differ between layers, or between keys and values.
    """
    shape = cache_shape(model)
    if len(set(shape.layers)) > 1 or len(shape.widths) > 1:
        raise UserError(
            f"The keys and values of {type(model).__name__} are not of one width in all layers.",
            "Measure lorc on a model such as Llama, Qwen, GPT-NeoX, OPT or GPT-2.",
        )
    return shape.layers[0].heads * shape.layers[0].keys


def _parts(model: nn.Module) -> Iterator[Part]:
    config: Any = model.config
    wide = columns_of(model)
    layers, heads, width = cache_shape(model).layers, *cache_shape(model).layers[0][:2]
    query = int(config.num_attention_heads) * width
    whole = torch.arange(wide)
    in_heads = torch.arange(heads)[:, None] * 3 * width + torch.arange(width)
    known = {
        "k_proj": (whole,), "v_proj": (whole,), "c_attn": (query + whole, query + wide + whole),
        "qkv_proj": (query + whole, query + wide + whole),
        "query_key_value": ((in_heads + width).flatten(), (in_heads + 2 * width).flatten()),
    }
    count = 0
    for name, module in model.named_modules():
        for columns in known.get(name.rpartition(".")[2], ()) if hasattr(module, "weight") else ():
            count += 1
            yield _part(module, columns)
    if count != 2 * len(layers):
        raise UserError(
            f"The projections of keys and values of {type(model).__name__} are not known.",
            "Measure lorc on a model such as Llama, Qwen, GPT-NeoX, OPT or GPT-2.",
        )


def _part(module: Any, columns: Tensor) -> Part:
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    columns = columns.to(weight.device)
    basis = torch.linalg.svd(weight[columns].float(), full_matrices=False).U
    return Part(module, columns, basis, None if module.bias is None else module.bias[columns])
