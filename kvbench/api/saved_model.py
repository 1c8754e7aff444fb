"""A model object as a folder that measuring processes load: kept between calls under the hash of what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvbench.errors import UserError
from kvbench.store.cached import cache_folder, filled_once


def model_folder(model: Any, tokenizer: Any) -> Path:
    """The folder of a model object, saved at the first call.

    It lies in kvbench's cache (``$KVBENCH_CACHE``), is named after the class and the hash of the model,
    and may be deleted.

    Raises:
        UserError: there is no tokenizer, the model cannot be saved, or the cache cannot be written.
    """
    from kvbench.api.identity import model_hash

    if tokenizer is None:
        raise UserError("A model object is given without its tokenizer.", "Give tokenizer=, or the id of the model.")
    folder = cache_folder() / "models" / f"{type(model).__name__}-{model_hash(model)}"

    def fill(part: Path) -> None:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)

    try:
        return filled_once(folder, fill)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"The model object cannot be saved to {folder}: {error}.", "Give the id or the folder of the model."
        ) from error
