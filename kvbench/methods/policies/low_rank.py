"""Replaces a model's key and value projections by low-rank ones, within a context manager, and shares ranks out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvbench.cache.latents import Basis
from kvbench.cache.shape import cache_shape
from kvbench.errors import UserError
from kvbench.models.rope import read_token_at

_FOUND: WeakKeyDictionary[nn.Module, list[Part]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Part:
    """The columns of a projection's output that are keys, or values.

    Attributes:
        module: the projection.
        columns: int64 ``[heads * width]``.
        basis: left singular vectors of the weights ``[heads * width, heads * width]``, by descending singular value.
        bias: ``[heads * width]``; None if there is none.
        log_condition: logarithm of the largest over the smallest singular value.
    """

    module: nn.Module
    columns: Tensor
    basis: Tensor
    bias: Tensor | None
    log_condition: float

    def cut(self, rank: int) -> Basis:
        """The basis of the best approximation of that rank."""
        return Basis(self.basis[:, :rank], self.bias)

    def reduced(self, output: Tensor, rank: int) -> Tensor:
        """The output as if the weights of these columns were replaced by their best approximation of that rank."""
        if rank >= len(self.columns):
            return output
        basis = self.cut(rank)
        low = basis.vectors(basis.latents(output[..., self.columns]))
        return output.index_copy(-1, self.columns, low.to(output.dtype))


@contextmanager
def low_rank(model: nn.Module, ranks: Sequence[int]) -> Iterator[None]:
    """Compute keys and values with weights of lower rank, over all heads of a layer together, within the block.

    Args:
        ranks: of the keys and of the values, by layer.

    Raises:
        UserError: the model's key and value projections are not known.
    """
    with ExitStack() as stack:
        for place, part in enumerate(parts_of(model)):
            def hook(module: nn.Module, inputs: Any, output: Tensor, part: Part = part, place: int = place) -> Tensor:
                return part.reduced(output, ranks[place // 2])

            stack.callback(part.module.register_forward_hook(hook).remove)
        yield


def parts_of(model: nn.Module) -> list[Part]:
    """The projections of keys and of values in turn, layer by layer; found at the first call.

    Raises:
        UserError: they are not known, or keys are not stored as their projection gives them.
    """
    if model not in _FOUND:
        found = list(_parts(model))
        _check_stored(model, found)
        _FOUND[model] = found
    return _FOUND[model]


@lru_cache(maxsize=256)
def shared_out(total: int, weights: tuple[float, ...], most: int) -> tuple[int, ...]:
    """Share out a total in proportion to weights, by D'Hondt: at least 1 each, and at most ``most``."""
    found = [1] * len(weights)
    for _ in range(min(total, most * len(weights)) - len(weights)):
        open_ = [place for place, count in enumerate(found) if count < most]
        found[max(open_, key=lambda place: weights[place] / (found[place] + 1))] += 1
    return tuple(found)


def depth_weights(parts: Sequence[Part], least: float) -> tuple[float, ...]:
    """What share of the largest rank each layer gets: 1 in the layer that most depends on, ``least`` in the one that
    least does, by the logarithms of the condition numbers of this and all later layers."""
    logs = [part.log_condition for part in parts]
    after = [sum(logs[2 * layer :]) for layer in range(len(logs) // 2)]
    span = max(after) - min(after)
    return tuple(1 - (1 - least) * (max(after) - one) / span if span else 1.0 for one in after)


def columns_of(model: nn.Module) -> int:
    """Width of a layer's keys over all heads, which is that of its values as well.

    Raises:
        UserError: widths differ between layers, or between keys and values.
    """
    shape = cache_shape(model)
    if len(set(shape.layers)) > 1 or len(shape.widths) > 1:
        raise UserError(
            f"The keys and values of {type(model).__name__} are not of one width in all layers.",
            "Measure lorc on a model such as Llama, Qwen2, GPT-NeoX, OPT or GPT-2.",
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
            "Measure lorc on a model such as Llama, Qwen2, GPT-NeoX, OPT or GPT-2.",
        )


def _check_stored(model: nn.Module, parts: Sequence[Part]) -> None:
    """Check that a key at position 0, where no rotation changes it, is what its projection gives.

    Raises:
        UserError: it is not: keys are normalised, or scaled.
    """
    given: list[Tensor] = []
    with ExitStack() as stack:
        for part in parts[::2]:
            def hook(module: nn.Module, inputs: Any, output: Tensor, part: Part = part) -> None:
                given.append(output[0, 0, part.columns].float())

            stack.callback(part.module.register_forward_hook(hook).remove)
        read = read_token_at(model, 0)
    assert read is not None, "every model reads position 0"
    for call, mine in zip(read[0], given, strict=True):
        key = call.key[0, :, 0].flatten().float()
        if float((key - mine).abs().max()) > 0.01 * float(mine.abs().max()):
            raise UserError(
                f"{type(model).__name__} changes its keys after their projection (a norm, or a scale), so that "
                "coordinates of the projection do not give them.",
                "Measure lorc on a model such as Llama, Qwen2, GPT-NeoX, OPT or GPT-2.",
            )


def _part(module: Any, columns: Tensor) -> Part:
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    columns = columns.to(weight.device)
    basis, values, _ = torch.linalg.svd(weight[columns].float(), full_matrices=False)
    bias = None if module.bias is None else module.bias[columns].float()
    return Part(module, columns, basis, bias, float((values[0] / values[-1].clamp(min=1e-12)).log()))
