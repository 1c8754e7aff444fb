"""Hashes of large files, kept between commands by what the file system says of the file."""

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
"""A file that changed less than this before it was read may change again without another time of change, since
file systems count time in ticks (of up to two seconds): its hash is not kept."""
_KEPT = 2000
_HEX = hashlib.sha256().digest_size * 2


def file_hashes(paths: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of every byte of files, in hexadecimal.

    A hash is taken from the cache if place, size, device, inode and both times are those it was made at. The
    time of the last change of the inode (``ctime``) cannot be set back, as that of the content can.

    Raises:
        OSError: a file cannot be read.
    """
    known = read_cache(CACHE) if paths else {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing runs beside Python
        found = list(pool.map(lambda path: _hashed(path, known), paths))
    made = {str(path.resolve()): kept for path, (_, kept) in zip(paths, found, strict=True) if kept is not None}
    if made:  # what others have written meanwhile stays; what is lost is only hashed again
        write_cache(CACHE, dict([*{**read_cache(CACHE), **made}.items()][-_KEPT:]))
    return {path: digest for path, (digest, _) in zip(paths, found, strict=True)}


def _hashed(path: Path, known: dict[str, Any]) -> tuple[str, list[int | str] | None]:
    """The hash, and what to keep of it: nothing if it is kept already, or if the file is not settled."""
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
