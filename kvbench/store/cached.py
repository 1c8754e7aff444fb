"""Cache between commands: JSON files in a folder of the user, which may be deleted at any time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

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


def filled_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled at the first call, whole or not at all; another process may be faster.

    Raises:
        OSError: it cannot be written.
    """
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.{uuid4().hex[:12]}.part")
    try:
        part.mkdir(parents=True)
        fill(part)
        os.replace(part, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


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
