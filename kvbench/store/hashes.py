"""Hashes of large files, cached between commands by the metadata of the file."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvbench.store.cached import read_cache, write_cache

CACHE = "file-hashes.json"
SETTLED_NS = 2_000_000_000
"""The hash of a file that was modified less than this many nanoseconds before reading is not cached: file systems
count time in ticks of up to two seconds, so it may change again without a new modification time."""
_KEPT = 2000
_HEX = hashlib.sha256().digest_size * 2


def file_hashes(paths: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of the content of files, in hexadecimal.

    A cached hash is used if path, size, device, inode, ``mtime`` and ``ctime`` are those that it was computed at.
    Unlike
    ``mtime``, the time of the last change of the inode (``ctime``) cannot be set back.

    Raises:
        OSError: a file cannot be read.
    """
    known = read_cache(CACHE) if paths else {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        found = list(pool.map(lambda path: _hashed(path, known), paths))
    made = {str(path.resolve()): kept for path, (_, kept) in zip(paths, found, strict=True) if kept is not None}
    if made:  # entries written by others meanwhile are kept; a lost one is only computed again
        write_cache(CACHE, dict([*{**read_cache(CACHE), **made}.items()][-_KEPT:]))
    return {path: digest for path, (digest, _) in zip(paths, found, strict=True)}


def _hashed(path: Path, known: dict[str, Any]) -> tuple[str, list[int | str] | None]:
    """The hash, and the entry to cache; None if it is cached already, or the file was modified too recently."""
    with path.open("rb") as file:
        state = _state(file.fileno())
        match known.get(str(path.resolve())):
            case [*before, str(digest)] if before == state and len(digest) == _HEX:
                return digest, None
        is_settled = time.time_ns() - max(state[1], state[2]) > SETTLED_NS
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        is_settled = is_settled and _state(file.fileno()) == state
    return digest, [*state, digest] if is_settled else None


def _state(descriptor: int) -> list[int]:
    stat = os.fstat(descriptor)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
