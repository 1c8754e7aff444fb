"""Layers that attend to the entries of another layer instead of entries of their own: CLA (arXiv 2405.12981), YOCO
(arXiv 2405.05254) and what lies between them, on a model that was not made so.

A sharing layer stores nothing, so that the bytes of a cache are those of the layers that it reads from, whatever a
method removes of them. No model code is copied: a layer's attention is given something in the place of the cache that
hands it the entries its source layer has just attended. Its own projections of keys and values are not used.

Without training a model converted so predicts badly; ``kvbench train --method adapted --set adapter=full --share ...``
goes on training it, and ``--share FOLDER`` takes the weights that result. Departures: weights of layers that share are
not averaged, as LCKV (arXiv 2405.10637) does it; sources lie below, so that nothing is iterated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

MARK = ":share="
"""Between a model's name and how its layers share."""
_CACHES = ("past_key_values", "layer_past")
"""What attention modules call the cache."""


@dataclass(frozen=True)
class Sharing:
    """Which layer each layer reads from.

    Attributes:
        sources: for every layer the number of a layer below it, or its own.
    """

    sources: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, layers: int | None) -> Sharing:
        """``pairs`` (every second layer reads from the one below), ``yoco`` (the upper half reads from the layer in the
        middle), or the source of each layer, such as ``0_0_2_2_4_4``.

        Args:
            layers: number of layers of the model; None if it is not known yet.

        Raises:
            UserError: it is none of these, or does not fit the number of layers.
        """
        layers = layers or len(text.split("_"))
        if text == "pairs":
            return cls(tuple(layer - layer % 2 for layer in range(layers)))
        if text == "yoco":
            return cls(tuple(min(layer, max(0, layers // 2 - 1)) for layer in range(layers)))
        if not re.fullmatch(r"\d+(_\d+)*", text):
            raise UserError(
                f"--share {text} is unknown.",
                "Give pairs, yoco, the source of every layer as in 0_0_2_2, or a folder that was trained so.",
            )
        found = tuple(int(part) for part in text.split("_"))
        if len(found) != layers:
            raise UserError(f"--share {text} names {len(found)} layers, and the model has {layers}.")
        for layer, source in enumerate(found):
            if source > layer or found[source] != source:
                raise UserError(
                    f"--share {text}: layer {layer} cannot read from layer {source}, which "
                    f"{'lies above it' if source > layer else 'keeps nothing itself'}.",
                    "A source is a layer below that reads from itself.",
                )
        return cls(found)

    @cached_property
    def stored(self) -> tuple[int, ...]:
        """The layers that keep entries."""
        return tuple(sorted(set(self.sources)))

    def whole_bytes(self, entry_bytes: int) -> int:
        """Bytes of an entry of the model that shares nothing, given those of this one, whose layers are alike."""
        return entry_bytes * len(self.sources) // len(self.stored)


def sharing_of(model: nn.Module) -> Sharing | None:
    """How the layers of a loaded model share; None if every layer has entries of its own."""
    found = getattr(model, "kvbench_sharing", None)
    return found if isinstance(found, Sharing) else None


def shares(module: nn.Module) -> bool:
    """Whether an attention module reads from another layer."""
    return bool(getattr(module, "kvbench_shares", False))


class _Handing:
    """What a layer's attention takes for the cache: stores its entries and sets aside what it attends, or hands out
    what its source has set aside."""

    def __init__(self, cache: Any, aside: dict[int, tuple[Tensor, Tensor]], source: int, is_own: bool, is_last: bool):
        self.cache, self.aside, self.source, self.is_own, self.is_last = cache, aside, source, is_own, is_last

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_own:
            return self.aside.pop(self.source) if self.is_last else self.aside[self.source]
        found: tuple[Tensor, Tensor] = (
            (keys, values) if self.cache is None else self.cache.update(keys, values, layer, *args, **kwargs)
        )
        if not self.is_last:
            self.aside[self.source] = found
        return found


def share_layers(model: nn.Module, sharing: Sharing, name: str) -> None:
    """Make the layers of a loaded model share, for good.

    Raises:
        UserError: its attention modules are not one per layer.
    """
    modules: list[Any] = [module for module in model.modules() if _is_attention(module)]
    if sorted(module.layer_idx for module in modules) != list(range(len(sharing.sources))):
        raise UserError(
            f"{name} ({type(model).__name__}) has not one attention per layer: its layers cannot share.",
            "Leave --share out.",
        )
    aside: dict[int, tuple[Tensor, Tensor]] = {}
    for module in modules:
        layer = int(module.layer_idx)
        source = sharing.sources[layer]
        readers = [other for other, reads in enumerate(sharing.sources) if reads == source]
        module.register_forward_pre_hook(
            _handed(aside, source, layer == source, layer == readers[-1]), with_kwargs=True
        )
        # Caches number the layers that they hold.
        module.layer_idx = sharing.stored.index(source)
        module.kvbench_shares = layer != source
    model.kvbench_sharing = sharing  # type: ignore[assignment]


def _is_attention(module: Any) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__


def _handed(aside: dict[int, tuple[Tensor, Tensor]], source: int, is_own: bool, is_last: bool) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        called = next((name for name in _CACHES if name in kwargs), None)
        if called is None:
            raise UserError(
                f"{type(module).__name__} is not given its cache by a name that is known: its layers cannot share.",
                "Leave --share out.",
            )
        return args, {**kwargs, called: _Handing(kwargs[called], aside, source, is_own, is_last)}

    return hook
