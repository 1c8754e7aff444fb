"""The state of a session as plain values and tensors, to be stored in a file and set up again; nothing is unpickled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.cache.evicting import EvictingLayer
from kvbench.cache.latents import Latents
from kvbench.cache.policy_cache import PolicyLayer
from kvbench.cache.pruned_channels import PrunedChannels
from kvbench.cache.quantized import Codes, Float8, Quantised
from kvbench.cache.ragged import Ragged
from kvbench.methods.policies.low_rank import parts_of

_KINDS = {
    kind.__name__: kind for kind in (
        PolicyLayer, EvictingLayer, Ragged, Codes, Quantised, Float8, PrunedChannels, Latents,
    )
}
_SESSION = (
    "read", "since", "seen", "peak", "context", "removals", "removed_at", "fed", "kept", "stored", "holes", "is_loose",
    "state", "pending", "rows", "written", "pairs", "last",
)
_CACHE = ("read", "begin", "is_full_step")
_SPARE = ("_room", "of_keys", "of_values")
"""Attributes that are made again when they are needed, or are the model's."""


def session_state(session: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a session and its cache hold, as values of JSON; tensors are put into ``tensors``, by name."""
    cache = session.cache
    return {
        "session": {name: _encoded(getattr(session, name), tensors) for name in _SESSION if name in vars(session)},
        "cache": {name: _encoded(getattr(cache, name), tensors) for name in _CACHE if name in vars(cache)},
        "layers": [_encoded(layer, tensors) for layer in cache.layers],
    }


def restore_session(session: Any, state: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Set up a freshly opened session with what :func:`session_state` gave.

    Raises:
        KeyError, TypeError, ValueError: it is not what that function gives.
    """
    for owner, names, saved in ((session, _SESSION, state["session"]), (session.cache, _CACHE, state["cache"])):
        for name, value in saved.items():
            if name not in names:
                raise ValueError(f"a session has no {name}")
            setattr(owner, name, _decoded(value, tensors, device))
    session.cache.layers = [_decoded(layer, tensors, device) for layer in state["layers"]]
    for number, layer in enumerate(session.cache.layers):
        for latents in (stored for stored in getattr(layer, "packed", ()) if isinstance(stored, Latents)):
            parts = parts_of(session.model)[2 * number : 2 * number + 2]
            for name, part, one in zip(("of_keys", "of_values"), parts, latents.tensors(), strict=True):
                object.__setattr__(latents, name, part.cut(one.shape[-1]))


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name, "device": value.device.type}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, (list, tuple)):
        return {"items": [_encoded(one, tensors) for one in value], "tuple": isinstance(value, tuple)}
    name = type(value).__name__
    if name not in _KINDS:
        raise TypeError(f"a cache holds a {name}, which cannot be stored")
    content = {key: _encoded(one, tensors) for key, one in vars(value).items() if key not in _SPARE}
    return {"kind": name, "content": content}


def _decoded(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].to("cpu" if value["device"] == "cpu" else device)
    if "dtype" in value:
        found = getattr(torch, value["dtype"], None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{value['dtype']} is no type of numbers")
        return found
    if "items" in value:
        items = [_decoded(one, tensors, device) for one in value["items"]]
        return tuple(items) if value["tuple"] else items
    if "kind" not in value:
        return device
    kind: Any = _KINDS[value["kind"]]
    made = kind() if issubclass(kind, EvictingLayer) else object.__new__(kind)
    for key, one in value["content"].items():
        if key.startswith("__"):
            raise ValueError(f"a cache has no {key}")
        object.__setattr__(made, key, _decoded(one, tensors, device))
    return made
