"""The shape of what a model caches, seen rather than worked out from its configuration."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvbench.cache.evicting import EvictingCache
from kvbench.methods.shape import CacheShape, LayerShape

_SEEN: WeakKeyDictionary[nn.Module, CacheShape] = WeakKeyDictionary()


def cache_shape(model: nn.Module) -> CacheShape:
    """What the model puts into its cache for a token, by layer: two tokens are read, once for every model."""
    if model not in _SEEN:
        cache, device = EvictingCache(), next(model.parameters()).device
        with torch.inference_mode():
            model(
                input_ids=torch.ones(1, 2, dtype=torch.long, device=device), past_key_values=cache, use_cache=True,
                attention_mask=torch.ones(2, 2, dtype=torch.bool, device=device).tril()[None, None],
                position_ids=torch.arange(2, device=device)[None],
            )
        _SEEN[model] = CacheShape(
            tuple(LayerShape(x.keys.shape[1], x.keys.shape[-1], x.values.shape[-1]) for x in cache.layers),
            cache.layers[0].keys.element_size(),
        )
    return _SEEN[model]
