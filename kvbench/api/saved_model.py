"""A model object as a folder that measuring processes load: kept between calls under the hash of what it computes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from kvbench.errors import UserError
from kvbench.store.cached import cache_folder


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
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.{uuid4().hex[:12]}.part")
    try:
        part.mkdir(parents=True)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, folder)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        if folder.is_dir():  # another process was faster
            return folder
        raise UserError(
            f"The model object cannot be saved to {folder}: {error}.", "Give the id or the folder of the model."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
