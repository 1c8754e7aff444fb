"""A device that is not there: tensors that say they are on it, and are on the CPU. What mixes the two fails, as it
would on a GPU, and what does not gives the CPU's numbers.

A script of its own, since a process has such a device for good: prints what was tried, and what went wrong, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretended"
CROSSES = ("aten._to_copy.default", "aten.copy_.default")
"""Operations whose purpose it is to go from one device to another."""
INDEXES = ("aten.index.Tensor", "aten.index_put_.default")
"""Operations on a GPU that take indices from the CPU (at the price of a copy)."""
TRIED = ("streamed is one pass, float32", "removed is masked, float32")
"""Groups of cells."""


class Pretended(torch.Tensor):
    """A tensor on the device, around the one that it is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0), requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def item(self) -> Any:
        return self.inner.item()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def cpu(self) -> Any:
        return self.to("cpu")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __bool__(self) -> bool:
        return bool(self.inner)

    def __int__(self) -> int:
        return int(self.inner)

    def __float__(self) -> float:
        return float(self.inner)


class Device(TorchDispatchMode):
    """Sees also what has no tensor of the device among its arguments: what is made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def leaves(value: Any) -> Iterator[Any]:
    """What is in the lists, tuples and dictionaries of a call; PyTorch's own trees take longer than the calls."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """The same lists, tuples and dictionaries, with the function of whatever is in them."""
    if isinstance(value, list | tuple):
        parts = [each(function, part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {name: each(function, part) for name, part in value.items()}
    return function(value)


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Carry out an operation on the CPU, if its arguments are on one device."""
    name, tensors = str(func), [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
    here = [t for t in tensors if isinstance(t, Pretended)]
    there = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if here and there and name not in CROSSES and not (name in INDEXES and isinstance(args[0], Pretended)):
        raise RuntimeError(f"{name}: {[list(t.shape) for t in here]} and on the CPU {[list(t.shape) for t in there]}")
    asked = kwargs.get("device")
    if asked is not None:
        is_here = torch.device(asked).type == NAME
        kwargs = {**kwargs, "device": "cpu" if is_here else asked}
    else:
        is_here = isinstance(args[0], Pretended) if name == "aten.copy_.default" else bool(here)
    out = func(*each(inner, args), **each(inner, kwargs))
    if not is_here:
        return out
    same = {id(t.inner): t for t in here}  # what is written in place stays the same tensor

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else Pretended(value)

    return each(placed, out)


def set_up() -> torch.device:
    """Make the device known, and whatever of PyTorch does not ask before it allocates."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)  # type: ignore[no-untyped-call]
    attend, make, generator = functional.scaled_dot_product_attention, torch.tensor, torch.Generator

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        given = (query, key, value, attn_mask)
        kinds = {isinstance(t, Pretended) for t in given if t is not None}
        if len(kinds) > 1:
            raise RuntimeError("attention over two devices")
        out = attend(*map(inner, given), **more)
        return Pretended(out) if kinds == {True} else out

    def tensor(data: Any, *more: Any, device: Any = None, **named: Any) -> Tensor:
        made = make(data, *more, **named)
        return made if device is None else made.to(device)

    class Generator:
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator()

    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    torch.tensor, torch.Generator = tensor, Generator  # type: ignore[assignment, misc]
    # Tensors of this kind can be made in no_grad only, and have no precision of their own.
    torch.inference_mode = lambda *_: torch.no_grad()  # type: ignore[assignment, misc, return-value]
    torch.autocast = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment, misc]
    return torch.device(NAME, 0)


def main() -> None:
    """Carry out the matrices of ``make gpu``, small, on the device."""
    from benchmarks.gpu.cells import Found
    from benchmarks.gpu.planning import planned
    from benchmarks.gpu.workshop import SMALL, Workshop

    wrong, tried = [], []
    # Each operation is slow here, and few chunks carry all of them out; the last is of a single token.
    scale = replace(SMALL, text=49, chunks=(16,), steps=("16",))
    with Device():
        for cell in planned(Workshop(scale, set_up())):
            if cell.group not in TRIED:
                continue
            found = Found()
            tried.append(f"{cell.group}: {cell.name}")
            try:
                cell.run(found, time.monotonic())
            except (RuntimeError, NotImplementedError) as error:
                found.is_right, found.says = False, f"{type(error).__name__}: {error}"
            if not found.is_right:
                wrong.append(f"{tried[-1]}: {found.says}")
    json.dump({"tried": tried, "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    main()
