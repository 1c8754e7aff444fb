"""Replaces a model's key and value projections by low-rank ones, within a context manager, and shares ranks out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvbench.cache.latents import Basis
from kvbench.cache.shape import cache_shape
from kvbench.errors import UserError
from kvbench.models.rope import read_token_at
from kvbench.models.sharing import shares

_FOUND: WeakKeyDictionary[nn.Module, list[Part]] = WeakKeyDictionary()
_RANKS: WeakKeyDictionary[nn.Module, dict[tuple[int, float], tuple[int, ...]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Part:
    """The columns of a projection's output that are keys, or values.

    Attributes:
        module: the projection.
        columns: int64 ``[heads * width]``.
        basis: left singular vectors of the weights, by descending singular value: ``[heads * width, n]``, where n is
            the smaller of heads * width and the model's width.
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


@torch.no_grad()
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


def ranks_by_layer(model: nn.Module, rank: int, least: float) -> tuple[int, ...]:
    """Ranks of the layers, ``rank`` on average: those of :func:`depth_weights`; computed at the first call."""
    parts, known = parts_of(model), _RANKS.setdefault(model, {})
    if (rank, least) not in known:
        known[rank, least] = shared_out(rank * len(parts) // 2, depth_weights(parts, least), columns_of(model))
    return known[rank, least]


def shared_out(total: int, weights: Sequence[float], most: int) -> tuple[int, ...]:
    """Share out a total in proportion to weights, by D'Hondt: at least 1 each, and at most ``most``."""
    found = [1] * len(weights)
    waiting = [(-weight / 2, place) for place, weight in enumerate(weights) if most > 1]
    heapify(waiting)
    for _ in range(min(total, most * len(weights)) - len(weights)):
        _, place = waiting[0]
        found[place] += 1
        if found[place] < most:
            heapreplace(waiting, (-weights[place] / (found[place] + 1), place))
        else:
            heappop(waiting)
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
        if shares(model.get_submodule(name.rpartition(".")[0])):
            continue
        for columns in known.get(name.rpartition(".")[2], ()) if hasattr(module, "weight") else ():
            count += 1
            yield _part(module, columns)
    if count != 2 * len(layers):
        raise UserError(
            f"The projections of keys and values of {type(model).__name__} are not known.",
            "Measure lorc on a model such as Llama, Qwen2, GPT-NeoX, OPT or GPT-2.",
        )


def _check_stored(model: nn.Module, parts: Sequence[Part]) -> None:
    """Check that a key at position 0, where no rotation changes it, and a value are what their projections give.

    Raises:
        UserError: they are not: they are normalised, scaled, or clipped.
    """
    given: list[Tensor] = []
    with ExitStack() as stack:
        for part in parts:
            def hook(module: nn.Module, inputs: Any, output: Tensor, part: Part = part) -> None:
                given.append(output[0, 0, part.columns].float())

            stack.callback(part.module.register_forward_hook(hook).remove)
        read = read_token_at(model, 0)
    assert read is not None, "every model reads position 0"
    stored = [tensor[0, :, 0].flatten().float() for call in read[0] for tensor in (call.key, call.value)]
    apart = [float((one - other).abs().max() / other.abs().max()) for one, other in zip(stored, given, strict=True)]
    if max(apart) > 0.01 or getattr(model.config, "clip_qkv", None):
        raise UserError(
            f"{type(model).__name__} changes its keys or values after their projection (a norm, a scale, a limit), "
            "so that coordinates of the projection do not give them.",
            "Measure lorc on a model such as Llama, Qwen2, GPT-NeoX, OPT or GPT-2.",
        )


def _part(module: Any, columns: Tensor) -> Part:
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    columns = columns.to(weight.device)
    basis, values, _ = torch.linalg.svd(weight[columns].float(), full_matrices=False)
    bias = None if module.bias is None else module.bias[columns].float()
    return Part(module, columns, basis, bias, float((values[0] / values[-1].clamp(min=1e-12)).log()))
