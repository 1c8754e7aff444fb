"""Files of records that may be packed by gzip, as those of a run that is published."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path


def stored(path: Path) -> Path:
    """The file itself, or the packed one in its place; the file if there is neither."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.exists() and not path.exists() else path


def unpacked(path: Path) -> bytes:
    """The content of a file, unpacked.

    Raises:
        OSError: it cannot be read, or is damaged.
    """
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, zlib.error) as error:
        raise OSError(f"it is damaged ({error})") from error
