"""What a configuration says of a model that reads text."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text: all of it, unless the model also reads other things."""
    return config.get_text_config(decoder=True)


def context_of(config: Any) -> int:
    """Positions that the model was made for."""
    config = text_config(config)
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return 2048
