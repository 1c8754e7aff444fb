"""Cache between commands: JSON files in a folder of the user, which may be deleted at any time."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvbench.store.folder import write_atomic


def cache_folder() -> Path:
    """``$KVBENCH_CACHE``, else ``kvbench`` in ``$XDG_CACHE_HOME``, else ``~/.cache/kvbench``; it may not exist yet.

    Raises:
        RuntimeError: the user has no home directory.
    """
    own, shared = os.environ.get("KVBENCH_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "kvbench"


def read_cache(name: str) -> dict[str, Any]:
    """Read a file of the cache; empty if it is missing, damaged or not readable."""
    try:
        found = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):  # RuntimeError: nested too deeply, or no home
        return {}
    return found if isinstance(found, dict) else {}


def write_cache(name: str, content: dict[str, Any]) -> None:
    """Replace a file of the cache atomically; if that is impossible, nothing is stored."""
    with suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, json.dumps(content) + "\n")
