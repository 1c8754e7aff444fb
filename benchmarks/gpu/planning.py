"""The cells, in order of worth: does it run and hold at all, then how fast, then the long and the large."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.gpu import matrices, speed
from benchmarks.gpu.cells import Cell, Found
from benchmarks.gpu.workshop import Workshop
from kvbench.doctor import CHECKS, Check, Subject
from kvbench.methods import METHODS, LayoutMethod
from kvbench.methods.policies.policy import CachePolicy

COMPARED = ("full", "sinks", "snapkv", "sentinel", "kivi")
STOCK = "full-dynamic"
"""The full cache as transformers keeps it."""


def planned(shop: Workshop) -> list[Cell]:
    """All cells."""
    (short, long), (one, many) = shop.scale.lengths, shop.scale.batches
    return [
        Cell("machine", "copying", partial(speed.bandwidth, shop)),
        *_doctor(shop, "float32"), *_layouts(shop, "float32"), *_policies(shop, "float32"),
        Cell("machine", f"{shop.scale.model} in {shop.scale.dtype}", partial(speed.load, shop)),
        *_profiles(shop, short, one, (*COMPARED, STOCK)), *_profiles(shop, short, many, COMPARED),
        _prompt(shop, short), Cell("training", "a Sentinel step", partial(speed.training, shop)),
        *_doctor(shop, "bfloat16"),
        *_profiles(shop, long, one, COMPARED), _prompt(shop, long),
        *_layouts(shop, "bfloat16"), *_policies(shop, "bfloat16"),
        *(Cell("attention", name, partial(speed.kernel, shop, name)) for name in speed.CALLS),
        *_profiles(shop, long, many, COMPARED),
    ]


def _doctor(shop: Workshop, dtype: str) -> list[Cell]:
    return [
        Cell(f"doctor, {dtype}", check.__name__.replace("_", " "), partial(_checked, shop, dtype, check))
        for check in CHECKS
    ]


def _checked(shop: Workshop, dtype: str, check: Callable[[Subject], Check], found: Found, until: float) -> None:
    result = check(shop.subject(dtype))
    found.is_right, found.says = result.ok, result.found if result.ok else f"{result.found} - {result.advice}"


def _layouts(shop: Workshop, dtype: str) -> list[Cell]:
    return [
        Cell(f"streamed is one pass, {dtype}", name, _untimed(partial(matrices.layout_cell, shop, dtype, name)))
        for name, kind in METHODS.items() if issubclass(kind, LayoutMethod)
    ]


def _policies(shop: Workshop, dtype: str) -> list[Cell]:
    return [
        Cell(f"removed is masked, {dtype}", name, _untimed(partial(matrices.policy_cell, shop, dtype, name)))
        for name, kind in METHODS.items() if issubclass(kind, CachePolicy)
    ]


def _untimed(run: Callable[[Found], None]) -> Callable[[Found, float], None]:
    return lambda found, until: run(found)


def _profiles(shop: Workshop, length: int, batch: int, methods: tuple[str, ...]) -> list[Cell]:
    return [
        Cell("profile", f"{method}, {length} x {batch}", partial(speed.profile, shop, method, length, batch))
        for method in methods
    ]


def _prompt(shop: Workshop, length: int) -> Cell:
    batch = shop.scale.batches[0]
    return Cell("prompt", f"snapkv, {length} x {batch}", partial(speed.prompt, shop, "snapkv", length, batch))
