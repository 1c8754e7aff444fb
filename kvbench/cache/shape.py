"""The shape of a model's KV cache, measured instead of derived from the configuration, and bytes of an entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvbench.models.attention_hooks import without_observer
from kvbench.models.sharing import sharing_of


class LayerShape(NamedTuple):
    """Number of KV heads of a layer, and the widths of a key and of a value."""

    heads: int
    keys: int
    values: int


@dataclass(frozen=True)
class CacheShape:
    """Shape of the keys and values in a cache.

    Attributes:
        layers: shape of every layer.
        itemsize: bytes per element.
        hidden: width of the model's embeddings and last hidden states; 0 if it is not known.
    """

    layers: tuple[LayerShape, ...]
    itemsize: int
    hidden: int = 0

    @classmethod
    def uniform(cls, layers: int, heads: int, width: int, itemsize: int) -> CacheShape:
        """The shape of a cache with equal layers, and keys and values of one width."""
        return cls((LayerShape(heads, width, width),) * layers, itemsize)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry of one text: the keys and values of a token in all heads and layers."""
        return sum(heads * (keys + values) for heads, keys, values in self.layers) * self.itemsize

    @property
    def widths(self) -> set[int]:
        """The distinct widths of keys and values."""
        return {width for layer in self.layers for width in (layer.keys, layer.values)}


def whole_entry_bytes(model: nn.Module, entry_bytes: int) -> int:
    """Bytes of an entry if no layer shared those of another, given the bytes of one in this model's cache."""
    sharing = sharing_of(model)
    return entry_bytes if sharing is None else sharing.whole_bytes(entry_bytes)


_SEEN: WeakKeyDictionary[nn.Module, CacheShape] = WeakKeyDictionary()


def cache_shape(model: nn.Module) -> CacheShape:
    """The shape of the model's cache, measured by a forward pass over two tokens, once for every model."""
    from kvbench.cache.evicting import EvictingCache  # imports transformers, which planning does without

    if model not in _SEEN:
        cache, device = EvictingCache(), next(model.parameters()).device
        with torch.no_grad(), without_observer():
            model(
                input_ids=torch.ones(1, 2, dtype=torch.long, device=device), past_key_values=cache, use_cache=True,
                attention_mask=torch.ones(2, 2, dtype=torch.bool, device=device).tril()[None, None],
                position_ids=torch.arange(2, device=device)[None],
            )
        _SEEN[model] = CacheShape(
            tuple(LayerShape(x.keys.shape[1], x.keys.shape[-1], x.values.shape[-1]) for x in cache.layers),
            cache.layers[0].keys.element_size(), int(model.get_input_embeddings().weight.shape[1]),  # type: ignore[operator]
        )
    return _SEEN[model]
