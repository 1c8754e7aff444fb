"""kvbench: what compressing the KV cache of a language model costs and gains, with error bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbench.api.compress import compress as compress
    from kvbench.api.evaluate import evaluate as evaluate
    from kvbench.api.evaluate import list_methods as list_methods
    from kvbench.api.evaluate import load as load
    from kvbench.api.evaluate import profile as profile

__version__ = "0.2.0"
__all__ = ["__version__", "compress", "evaluate", "list_methods", "load", "profile"]

_PLACES = {
    "compress": "kvbench.api.compress", "evaluate": "kvbench.api.evaluate", "profile": "kvbench.api.evaluate",
    "load": "kvbench.api.evaluate", "list_methods": "kvbench.api.evaluate",
}
"""Where public names are defined; they are loaded when they are first used, so that ``import kvbench`` is instant."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'kvbench' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
