"""Helpers around a run: the lock on its folder, errors for a full disk, and the mark that it is finished."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kvbench.errors import UserError
from kvbench.store.folder import RunFolder

KEPT = "What was measured before is kept, and the same command goes on."


@contextmanager
def disk(path: Path, hint: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn an ``OSError`` inside, such as that of a full disk, into a user error of type ``kind``."""
    try:
        yield
    except OSError as error:
        raise kind(f"The output folder {path} cannot be written: {error.strerror}.", hint) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder against other processes; the lock file is in the temporary directory, not in the folder.

    Raises:
        UserError: another process is measuring into the folder, or the lock cannot be acquired.
    """
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"kvbench-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another kvbench is measuring into {folder}.", "Wait for it, or choose another --out."
        ) from None
    except OSError as error:
        raise UserError(
            f"The lock {lock.lock_file} of {folder} cannot be taken: {error.strerror}.",
            "If it is another user's, choose another --out, or set TMPDIR to a folder of your own.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def finish(folder: RunFolder, content: str) -> None:
    """Mark the run as finished in ``run.json``, if the file still describes a run of this content."""
    with folder.lock("manifest"):
        manifest = folder.manifest()
        if manifest.content == content:
            folder.describe(replace(manifest, finished=datetime.now(UTC).isoformat(timespec="seconds")))
