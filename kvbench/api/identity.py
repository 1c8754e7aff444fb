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
        found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(model.state_dict().items()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        _KNOWN[model] = found.hexdigest()[:16]
    return _KNOWN[model]
