"""The identity of a model object: a hash of its configuration and of all its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_KNOWN: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_OWN = ("_name_or_path", "_attn_implementation", "transformers_version", "dtype", "torch_dtype")
"""Settings of a configuration that say nothing of what the model computes."""


def model_hash(model: nn.Module) -> str:
    """Sixteen hexadecimal digits, equal for models that compute the same; taken once per model object.

    Weights that are changed afterwards are not seen.
    """
    if model not in _KNOWN:
        config: Any = model.config
        settings = {name: value for name, value in config.to_dict().items() if name not in _OWN}
        content = json.dumps(settings, sort_keys=True, default=str) + weights_hash(model)
        _KNOWN[model] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return _KNOWN[model]


def weights_hash(module: nn.Module) -> str:
    """Sixteen hexadecimal digits of all weights of a module, by name, shape and type."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
