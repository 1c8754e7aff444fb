"""Settings that are read from the configuration of a language model."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the text decoder: all of it, unless the model is multimodal."""
    return config.get_text_config(decoder=True)


def context_of(config: Any) -> int:
    """Context length of the model in tokens; 2048 if the configuration does not say."""
    config = text_config(config)
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return 2048
